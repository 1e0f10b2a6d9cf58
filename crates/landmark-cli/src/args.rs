//! Types of flags that several commands share.

use std::fmt::Display;
use std::str::FromStr;

/// A flag that takes a value or `None`, as the reference's do. Under this name clap takes it for a value of its own and
/// not for a flag that may be left out.
pub type NoneOr<T> = Option<T>;

/// Reads a value or `None`.
pub fn none_or<T: FromStr<Err: Display>>(text: &str) -> Result<NoneOr<T>, String> {
    if text == "None" { Ok(None) } else { text.parse().map(Some).map_err(|error: T::Err| error.to_string()) }
}

/// Reads a truth value, written as in Python or in Rust.
pub fn truth(text: &str) -> Result<bool, String> {
    match text {
        "True" | "true" | "1" => Ok(true),
        "False" | "false" | "0" => Ok(false),
        _ => Err("expected True or False".into()),
    }
}
