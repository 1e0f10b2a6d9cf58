//! The page: the files of `page/dist`, as they are in the binary.

use super::App;
use axum::Router;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use landmark_inference::hex;
use sha2::{Digest, Sha256};
use std::sync::Arc;

/// What a page may load: what comes from here, and nothing that stands in the document itself.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// A file: its path, its type, and what is in it.
type File = (&'static str, &'static str, &'static str);

const FILES: [File; 4] = [
    ("/", "text/html; charset=utf-8", include_str!("../../page/dist/index.html")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("../../page/dist/page.js")),
    ("/page.css", "text/css; charset=utf-8", include_str!("../../page/dist/page.css")),
    ("/icon.svg", "image/svg+xml", include_str!("../../page/dist/icon.svg")),
];

/// Whether a path is one of the page's.
pub fn is_part(path: &str) -> bool {
    FILES.iter().any(|(of, _, _)| *of == path)
}

/// Its routes.
pub fn routes() -> Router<Arc<App>> {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        let etag = format!("\"{}\"", &hex(&Sha256::digest(text.as_bytes()))[..32]);
        let etag = HeaderValue::from_str(&etag).expect("hexadecimal digits are a header's value");
        router.route(path, get(move |headers: HeaderMap| async move { file(kind, text, etag, &headers) }))
    })
}

/// The file, or that it is still the one that the browser has.
fn file(kind: &'static str, text: &'static str, etag: HeaderValue, asked: &HeaderMap) -> Response {
    let is_known = asked.get(header::IF_NONE_MATCH) == Some(&etag);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::ETAG, etag),
    ];
    if is_known { (StatusCode::NOT_MODIFIED, headers).into_response() } else { (headers, text).into_response() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    /// `npm run build` in `page` makes it so.
    #[test]
    fn the_page_was_made_of_its_sources() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("page");
        let mut paths: Vec<String> = fs::read_dir(page.join("src"))
            .unwrap()
            .map(|entry| format!("src/{}", entry.unwrap().file_name().into_string().unwrap()))
            .collect();
        paths.extend(["build.mjs".into(), "package-lock.json".into()]);
        paths.sort();
        let mut hash = Sha256::new();
        for path in paths {
            hash.update(format!("{path}\n"));
            hash.update(fs::read(page.join(path)).unwrap());
        }
        let made_of = fs::read_to_string(page.join("dist/sources.sha256")).unwrap();
        assert_eq!(made_of.trim(), hex(&hash.finalize()), "page/dist is of other sources: npm ci && npm run build");
    }

    #[test]
    fn nothing_in_the_document_needs_what_the_policy_forbids() {
        let document = FILES[0].2;
        assert!(!document.contains("<style") && !document.contains("style=") && !document.contains(" on"));
        assert!(document.matches("<script").count() == 1 && document.contains("src=\"/page.js\"></script>"));
        assert!(FILES.iter().all(|(path, _, _)| is_part(path)) && !is_part("/page") && !is_part(""));
    }
}
