//! `GET /v1/models` and `GET /v1/models/{id}`. Names are looked up in a list and never become paths.

use axum::{
    Extension, Json,
    extract::{Path, State},
};
use ingle_engine::embed::EncoderTask;

use super::{
    params::unknown_model,
    types::{ModelList, ModelObject},
};
use crate::{
    error::ApiResult,
    state::{AppState, View},
};

/// The task as `/v1/models` and errors name it.
pub(crate) fn task_name(task: EncoderTask) -> &'static str {
    match task {
        EncoderTask::Embed => "embed",
        EncoderTask::Rerank => "rerank",
    }
}

/// The task of a model that generates.
pub(crate) const GENERATE: &str = "generate";

/// Every name that `view` shows, the main model's own first.
fn objects(state: &AppState, view: View) -> Vec<ModelObject> {
    let mut all = Vec::new();
    if let Some(generator) = state.generator().filter(|_| view == View::All) {
        let card = &generator.card;
        let main = state.default_model();
        all.extend(state.config().served_names.iter().map(|name| ModelObject {
            id: name.clone(),
            object: "model",
            created: card.created,
            owned_by: card.owned_by.clone(),
            root: card.root.clone(),
            parent: (name != main).then(|| main.to_owned()),
            max_model_len: state.limits().max_model_len,
            task: GENERATE,
            dimensions: None,
        }));
    }
    for encoder in state.encoders() {
        let (card, info) = (&encoder.card, encoder.handle.info());
        all.extend(encoder.names.iter().map(|name| ModelObject {
            id: name.clone(),
            object: "model",
            created: card.created,
            owned_by: card.owned_by.clone(),
            root: card.root.clone(),
            parent: (name != encoder.name()).then(|| encoder.name().to_owned()),
            max_model_len: info.max_seq_len,
            task: task_name(info.task),
            dimensions: (info.task == EncoderTask::Embed).then_some(info.dimensions),
        }));
    }
    all
}

/// Lists every served name.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "All names.", body = ModelList)))]
pub(crate) async fn list(State(state): State<AppState>, Extension(view): Extension<View>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: objects(&state, view) })
}

/// Describes one name; slashes in it may be encoded or not.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", params(("id" = String, Path, description = "A served name.")),
    responses(
        (status = 200, description = "The model.", body = ModelObject),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    ))]
pub(crate) async fn one(
    State(state): State<AppState>,
    Extension(view): Extension<View>,
    Path(id): Path<String>,
) -> ApiResult<Json<ModelObject>> {
    objects(&state, view).into_iter().find(|model| model.id == id).map(Json).ok_or_else(|| unknown_model(&id))
}
