//! Texts that come as files: what they may be, and whether they are what they say.

use super::App;
use crate::ApiError;
use crate::documents::{Document, NoText};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use std::convert::Infallible;
use tokio::sync::SemaphorePermit;

/// What may come.
const EXPECTED: &str = "expected application/json, text/plain, text/markdown, text/html or application/pdf, or one of these four in the field file of \
    multipart/form-data; texts in UTF-8";

/// A text to be appended.
pub struct Upload<'a> {
    /// The text.
    pub text: String,
    /// Whether another text that was cut short shall stay as it is.
    pub is_new_text: bool,
    /// Its place among the bodies that are looked into.
    pub place: SemaphorePermit<'a>,
}

/// What a file says that it is.
#[derive(Clone, Copy)]
enum Kind {
    Plain,
    Document(Document),
}

impl Kind {
    /// Of a `Content-Type`.
    fn of(content_type: &str) -> Option<Self> {
        let (kind, parameters) = content_type.split_once(';').unwrap_or((content_type, ""));
        let charset = parameters.split(';').find_map(|parameter| {
            let (name, value) = parameter.split_once('=')?;
            name.trim().eq_ignore_ascii_case("charset").then(|| value.trim().trim_matches('"').to_ascii_lowercase())
        });
        let is_known = matches!(charset.as_deref(), None | Some("utf-8" | "utf8" | "us-ascii"));
        match kind.trim().to_ascii_lowercase().as_str() {
            "text/plain" | "text/markdown" if is_known => Some(Self::Plain),
            "text/html" if is_known => Some(Self::Document(Document::Html)),
            "application/pdf" => Some(Self::Document(Document::Pdf)),
            _ => None,
        }
    }
}

/// The text of a request's body, whatever it comes as.
pub async fn upload(app: &App, request: Request) -> Result<Upload<'_>, ApiError> {
    let content_type = content_type(request.headers());
    if is(&content_type, "application/json") {
        let (mut fields, place) = app.fields(request).await?;
        let text = fields.required_text("text")?;
        let is_new_text = fields.boolean("new_text")?;
        fields.end("text and new_text")?;
        return Ok(Upload { text, is_new_text, place });
    }
    // Pages of other sites can send what is no JSON without asking; browsers say of which site they are.
    if !is_of_same_site(request.headers()) {
        let message = "a page of another site may not send files to this server";
        return Err(ApiError::new(StatusCode::FORBIDDEN, "foreign_origin", message));
    }
    let is_form = is(&content_type, "multipart/form-data");
    let kind = Kind::of(&content_type);
    if !is_form && kind.is_none() {
        return Err(unsupported());
    }
    let body = app.bytes(request).await?;
    let place = app.place().await?;
    let (kind, bytes, is_new_text) = match kind {
        Some(kind) => (kind, body, false),
        None => form(&content_type, body).await?,
    };
    Ok(Upload { text: text(app, kind, bytes).await?, is_new_text, place })
}

fn content_type(headers: &HeaderMap) -> String {
    headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_string()
}

fn is(content_type: &str, kind: &str) -> bool {
    content_type.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(kind)
}

/// Whether `Origin`, if there is one, names the host that is asked.
fn is_of_same_site(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).map(|host| host.as_bytes());
    let origin = origin.as_bytes();
    let of = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
    of.is_some_and(|of| host.is_some_and(|host| of.eq_ignore_ascii_case(host)))
}

/// The file of a form, and its field `new_text`.
async fn form(content_type: &str, body: Vec<u8>) -> Result<(Kind, Vec<u8>, bool), ApiError> {
    let invalid =
        |_| ApiError::new(StatusCode::BAD_REQUEST, "invalid_form", "the body is no form of this Content-Type");
    let boundary = multer::parse_boundary(content_type).map_err(invalid)?;
    let body = futures_util::stream::iter([Ok::<_, Infallible>(body)]);
    let mut form = multer::Multipart::new(body, boundary);
    let (mut file, mut is_new_text) = (None, false);
    while let Some(field) = form.next_field().await.map_err(invalid)? {
        match field.name() {
            Some("file") if file.is_none() => {
                let kind = field.content_type().and_then(|kind| Kind::of(kind.as_ref())).ok_or_else(unsupported)?;
                file = Some((kind, field.bytes().await.map_err(invalid)?.to_vec()));
            }
            Some("new_text") => {
                is_new_text = match field.text().await.map_err(invalid)?.as_str() {
                    "true" => true,
                    "false" => false,
                    _ => return Err(ApiError::value("new_text", "expected true or false")),
                }
            }
            _ => {
                let message =
                    "a field of the form is none that this server knows, or there twice; it knows file and new_text";
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "unknown_parameter", message));
            }
        }
    }
    let (kind, bytes) = file.ok_or_else(|| ApiError::value("file", "it is missing"))?;
    Ok((kind, bytes, is_new_text))
}

/// The text of a file that is what it says.
async fn text(app: &App, kind: Kind, mut bytes: Vec<u8>) -> Result<String, ApiError> {
    if matches!(kind, Kind::Document(_)) && app.converter.is_empty() {
        let message = "this server was started without what reads HTML and PDF; send the text of it";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_type", message));
    }
    let is_pdf = bytes.starts_with(b"%PDF-");
    if is_pdf != matches!(kind, Kind::Document(Document::Pdf)) {
        let message = "file: it is not of the type that it says";
        return Err(refused("wrong_type", message));
    }
    if !is_pdf {
        if bytes.starts_with("\u{feff}".as_bytes()) {
            bytes.drain(.."\u{feff}".len());
        }
        let is_text = std::str::from_utf8(&bytes).is_ok_and(|text| !text.contains('\0'));
        if !is_text {
            return Err(refused("not_utf8", "file: it is not a text in UTF-8"));
        }
    }
    let text = match kind {
        Kind::Plain => String::from_utf8(bytes).map_err(|_| refused("not_utf8", "file: it is not a text in UTF-8"))?,
        Kind::Document(document) => document.text(&app.converter, &bytes).await.map_err(|no_text| match no_text {
            NoText::Unreadable => {
                let message = "file: it is damaged, encrypted, or takes too much to be read";
                refused("unreadable_document", message)
            }
            NoText::TooLong => {
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "document_too_long", "file: there is too much text in it")
            }
            NoText::NoProcess(reason) => ApiError::internal(&anyhow::anyhow!("a document is not read: {reason}")),
        })?,
    };
    if text.trim().is_empty() {
        return Err(refused("no_text", "file: there is no text in it"));
    }
    Ok(text)
}

fn refused(code: &'static str, message: &str) -> ApiError {
    ApiError { param: Some("file"), ..ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, message) }
}

fn unsupported() -> ApiError {
    ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_type", EXPECTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_that_are_read_and_in_utf8() {
        for good in [
            "text/plain",
            "Text/Plain; charset=UTF-8",
            "text/markdown;charset=\"utf-8\"; x=y",
            "text/html",
            "application/pdf",
        ] {
            assert!(Kind::of(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "text",
            "text/plain; charset=latin1",
            "text/html; charset=utf-16",
            "application/json",
            "application/zip",
            "text/plainer",
        ] {
            assert!(Kind::of(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn origins_are_of_the_same_site_or_refused() {
        let of = |origin: Option<&str>, host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            origin.map(|origin| headers.insert(header::ORIGIN, origin.parse().unwrap()));
            is_of_same_site(&headers)
        };
        assert!(of(None, "127.0.0.1:8080") && of(Some("http://127.0.0.1:8080"), "127.0.0.1:8080"));
        assert!(of(Some("https://read.example"), "read.example"));
        for bad in [
            "null",
            "http://127.0.0.1",
            "http://127.0.0.1:80",
            "http://evil.example",
            "http://127.0.0.1:8080.evil.example",
            "127.0.0.1:8080",
        ] {
            assert!(!of(Some(bad), "127.0.0.1:8080"), "{bad}");
        }
    }
}
