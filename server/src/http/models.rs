//! `GET /v1/models` and `GET /v1/models/{id}`. Names are looked up in a list and never become paths.

use std::time::Instant;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{
    params::unknown_model,
    types::{ModelList, ModelObject},
};
use crate::{error::ApiResult, state::AppState};

fn object(state: &AppState, id: &str, model: &str) -> ModelObject {
    let card = state.card();
    let tier = state.tier().card(Instant::now(), model, id);
    ModelObject {
        id: id.to_owned(),
        object: "model",
        created: card.created,
        owned_by: card.owned_by.clone(),
        root: card.root.clone(),
        parent: (id != model).then(|| model.to_owned()),
        max_model_len: state.limits().max_model_len,
        card: tier,
    }
}

/// Lists every served name.
#[utoipa::path(get, path = "/v1/models", tag = "models",
    responses((status = 200, description = "All names.", body = ModelList)))]
pub(crate) async fn list(State(state): State<AppState>) -> Json<ModelList> {
    let data = state.names().iter().map(|(name, model)| object(&state, name, model)).collect();
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
    match state.resolve(&id) {
        Some(name) => Ok(Json(object(&state, &id, &name.served))),
        None => Err(unknown_model(&id)),
    }
}
