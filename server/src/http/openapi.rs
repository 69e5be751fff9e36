//! The OpenAPI document and a page that shows it. The page loads nothing from elsewhere.

use std::sync::LazyLock;

use axum::{
    body::Bytes,
    http::{HeaderValue, header},
    response::{Html, IntoResponse, Response},
};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
};

use super::{
    chat, completions,
    encode::{embeddings, rerank, score, tei},
    health, models, tier, tokenize, types,
};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Ingle",
        description = "Self-hosted LLM inference with the OpenAI API. Every answer that is not 2xx is an ErrorBody. \
                       Unknown request fields are accepted and listed in the response header `x-ignored-params`; \
                       parameters of the API that are not supported are refused with a 400 that names them."
    ),
    paths(
        chat::create, chat::render, completions::create, models::list, models::one, tokenize::tokenize,
        tokenize::detokenize, embeddings::create, rerank::create, score::create, tei::embed, tei::similarity,
        tei::root, tei::info, health::live, health::ready, health::version, health::metrics, tier::tier, tier::usage
    ),
    components(schemas(types::ChatChunk<'static>)),
    modifiers(&Keys, &Aliases)
)]
struct Document;

/// Says that routes may ask for a key.
struct Keys;

impl Modify for Keys {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        const NAME: &str = "api_key";
        let components = document.components.get_or_insert_default();
        components.add_security_scheme(NAME, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        document.security = Some(vec![SecurityRequirement::new(NAME, Vec::<String>::new())]);
    }
}

/// Describes routes that are another one under a second name.
struct Aliases;

impl Modify for Aliases {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for (alias, path) in
            [("/rerank", "/v1/rerank"), ("/v2/rerank", "/v1/rerank"), ("/score", "/v1/score")]
        {
            if let Some(item) = document.paths.paths.get(path).cloned() {
                document.paths.paths.insert(alias.to_owned(), item);
            }
        }
    }
}

static JSON: LazyLock<Bytes> = LazyLock::new(|| {
    let text = Document::openapi().to_json().expect("the document is made of strings and lists");
    Bytes::from(text)
});

/// The document.
pub(crate) async fn document() -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], JSON.clone()).into_response()
}

/// The page.
pub(crate) async fn page() -> Response {
    // The document goes into the page, so that the page works where /openapi.json needs a key it cannot send.
    // In JSON, `<` is only found in strings, where an escape means the same.
    let json = String::from_utf8_lossy(&JSON).replace('<', "\\u003c");
    let html = include_str!("docs.html").replace("\"%DOCUMENT%\"", &json);
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";
    let mut response = Html(html).into_response();
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described() {
        let document: serde_json::Value = serde_json::from_slice(&JSON).expect("JSON");
        let paths = document.get("paths").and_then(|p| p.as_object()).expect("paths");
        for path in super::super::paths() {
            let described = path.replace("{*id}", "{id}");
            let own = matches!(path, "/openapi.json" | "/docs");
            assert_eq!(paths.contains_key(&described), !own, "{path}");
        }
    }
}
