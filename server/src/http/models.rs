//! `GET /v1/models` and `GET /v1/models/{id}`. Names are looked up in a list and never become paths.

use axum::{
    Json,
    extract::{Path, State},
};

use super::{
    params::unknown_model,
    types::{ModelList, ModelObject},
};
use crate::{error::ApiResult, state::AppState};

fn object(state: &AppState, id: &str) -> ModelObject {
    let card = state.card();
    let main = state.default_model();
    ModelObject {
        id: id.to_owned(),
        object: "model",
        created: card.created,
        owned_by: card.owned_by.clone(),
        root: card.root.clone(),
        parent: (id != main).then(|| main.to_owned()),
        max_model_len: state.limits().max_model_len,
    }
}

/// Lists every served name.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "All names.", body = ModelList)))]
pub(crate) async fn list(State(state): State<AppState>) -> Json<ModelList> {
    let data = state.config().served_names.iter().map(|name| object(&state, name)).collect();
    Json(ModelList { object: "list", data })
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
    if state.config().served_names.contains(&id) {
        return Ok(Json(object(&state, &id)));
    }
    Err(unknown_model(&id))
}
