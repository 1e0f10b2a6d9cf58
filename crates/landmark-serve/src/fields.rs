//! The fields of a request's JSON: each is taken by name with what it may be, and none is left over.

use crate::ApiError;
use axum::http::StatusCode;
use serde_json::{Map, Value};
use std::ops::RangeInclusive;

/// An object whose fields are taken one by one. A field that is `null` is one that is left out.
pub struct Fields(Map<String, Value>);

impl Fields {
    /// Those of a body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(invalid("the body is JSON, but no object".into())),
            Err(error) => {
                // Its words may repeat what was sent; its place does not.
                Err(invalid(format!("the body is no JSON: line {}, column {}", error.line(), error.column())))
            }
        }
    }

    /// Those of an object in a field.
    pub fn of(value: Value, name: &'static str) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            _ => Err(ApiError::value(name, "expected an object")),
        }
    }

    /// Takes a field as it is.
    pub fn take(&mut self, name: &'static str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    /// Takes a truth value.
    pub fn boolean(&mut self, name: &'static str) -> Result<bool, ApiError> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(_) => Err(ApiError::value(name, "expected true or false")),
        }
    }

    /// Takes a text.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::value(name, "expected a string")),
        }
    }

    /// Takes a text that has to be there.
    pub fn required_text(&mut self, name: &'static str) -> Result<String, ApiError> {
        self.text(name)?.ok_or_else(|| ApiError::value(name, "it is missing"))
    }

    /// Takes a number of a range.
    pub fn number(&mut self, name: &'static str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number));
        let expected = || ApiError::value(name, format!("expected a number from {} to {}", range.start(), range.end()));
        number.map(Some).ok_or_else(expected)
    }

    /// Takes a whole number of a range.
    pub fn count(&mut self, name: &'static str, range: RangeInclusive<usize>) -> Result<Option<usize>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        let expected =
            || ApiError::value(name, format!("expected a whole number from {} to {}", range.start(), range.end()));
        number.filter(|number| range.contains(number)).map(Some).ok_or_else(expected)
    }

    /// Refuses fields that mean something which is not there, by name. At its default, which is given beside, one says nothing.
    pub fn refuse(&mut self, fields: impl IntoIterator<Item = (&'static str, Value)>) -> Result<(), ApiError> {
        for (name, default) in fields {
            if let Some(value) = self.take(name)
                && value != default
                // 0 and 0.0 are the same number, and not the same JSON.
                && (value.as_f64().is_none() || value.as_f64() != default.as_f64())
            {
                return Err(ApiError::unsupported(name));
            }
        }
        Ok(())
    }

    /// Refuses what was not taken.
    pub fn end(self, known: &str) -> Result<(), ApiError> {
        if self.0.values().all(Value::is_null) {
            return Ok(());
        }
        let message = format!("a field of the request is none that this server knows; it knows {known}");
        Err(ApiError::new(StatusCode::BAD_REQUEST, "unknown_parameter", message))
    }
}

fn invalid(message: String) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_is_no_object_is_refused_without_being_repeated() {
        for body in ["", "[]", "{\"secret\"", "secret", "\"secret\"", "{\"a\": 1e999}", &"[".repeat(100_000)] {
            let error = Fields::parse(body.as_bytes()).err().unwrap();
            assert!(error.status == StatusCode::BAD_REQUEST && !error.message.contains("secret"), "{error:?}");
        }
        assert!(Fields::parse(b"{\"a\": \"\xff\"}").is_err());
    }

    #[test]
    fn values_are_of_their_range_or_refused_by_name() {
        for bad in [json!(-1), json!(1.5), json!("1"), json!(11), json!(u64::MAX), json!([1]), json!(true)] {
            let error = fields(json!({ "n": bad })).count("n", 1..=10).unwrap_err();
            assert_eq!((error.param, error.message.as_str()), (Some("n"), "n: expected a whole number from 1 to 10"));
        }
        assert_eq!(fields(json!({ "n": 10 })).count("n", 1..=10), Ok(Some(10)));
        assert_eq!(fields(json!({ "n": null })).count("n", 1..=10), Ok(None));
        assert_eq!(fields(json!({ "t": 0 })).number("t", 0. ..=2.), Ok(Some(0.)));
        assert!(fields(json!({ "t": -1e308 })).number("t", 0. ..=2.).is_err());
        assert!(fields(json!({ "s": 1 })).boolean("s").is_err());
    }

    #[test]
    fn what_is_not_supported_is_refused_unless_it_says_nothing() {
        let refuse = |value| fields(json!({ "penalty": value })).refuse([("penalty", json!(0))]);
        assert!(refuse(json!(0)).is_ok() && refuse(json!(0.0)).is_ok() && refuse(json!(null)).is_ok());
        assert_eq!(refuse(json!(0.5)).unwrap_err().param, Some("penalty"));
        assert!(fields(json!({ "who": null })).end("n").is_ok());
        let error = fields(json!({ "secret": 1 })).end("n").unwrap_err();
        assert!(!error.message.contains("secret"));
    }
}
