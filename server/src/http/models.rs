//! `GET /v1/models` and `GET /v1/models/{id}`. Names are looked up in a list and never become paths.

use std::time::Instant;

use axum::{
    Json,
    extract::{Path, State},
};
use ingle_engine::embed::EncoderTask;

use super::{
    params::unknown_model,
    types::{ModelList, ModelObject},
};
use crate::{error::ApiResult, state::AppState};

/// The task as `/v1/models` and errors name it.
pub(crate) fn task_name(task: EncoderTask) -> &'static str {
    match task {
        EncoderTask::Embed => "embed",
        EncoderTask::Rerank => "rerank",
    }
}

/// The task of a model that generates.
pub(crate) const GENERATE: &str = "generate";

/// Every name that the address serves, the main model's own first, aliases last.
fn objects(state: &AppState) -> Vec<ModelObject> {
    let now = Instant::now();
    let object = |(name, own): (String, String)| {
        let encoder = state.encoders().iter().find(|encoder| encoder.name() == own);
        let (card, task, max_model_len, dimensions) = match (encoder, state.generator()) {
            (Some(encoder), _) if !state.view().shows(encoder.task()) => return None,
            (Some(encoder), _) => {
                let info = encoder.handle.info();
                let dimensions = (info.task == EncoderTask::Embed).then_some(info.dimensions);
                (&encoder.card, task_name(info.task), info.max_seq_len, dimensions)
            }
            (None, Some(generator)) if state.generates() => {
                (&generator.card, GENERATE, state.limits().max_model_len, None)
            }
            (None, _) => return None,
        };
        Some(ModelObject {
            object: "model",
            created: card.created,
            owned_by: card.owned_by.clone(),
            root: card.root.clone(),
            parent: (name != own).then(|| own.clone()),
            max_model_len,
            task,
            dimensions,
            tier_card: state.tier().card(now, &own, &name),
            id: name,
        })
    };
    state.names().into_iter().filter_map(object).collect()
}

/// Lists every served name.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "All names.", body = ModelList)))]
pub(crate) async fn list(State(state): State<AppState>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: objects(&state) })
}

/// Describes one name; slashes in it may be encoded or not.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", params(("id" = String, Path, description = "A served name.")),
    responses(
        (status = 200, description = "The model.", body = ModelObject),
        (status = "default", description = "What went wrong.", body = crate::error::ErrorBody)
    ))]
pub(crate) async fn one(
    State(state): State<AppState>,
    Path(id): Path<String>,
) -> ApiResult<Json<ModelObject>> {
    objects(&state).into_iter().find(|model| model.id == id).map(Json).ok_or_else(|| unknown_model(&id))
}
