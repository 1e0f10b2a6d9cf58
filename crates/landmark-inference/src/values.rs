//! Values of flags.

use std::fmt::Display;
use std::str::FromStr;

/// A flag that takes a value or `None`, as the reference's do. Under this name clap takes it for a value of its own and
/// not for a flag that may be left out.
pub type NoneOr<T> = Option<T>;

/// Reads a value or `None`.
pub fn none_or<T: FromStr<Err: Display>>(text: &str) -> Result<NoneOr<T>, String> {
    if text == "None" { Ok(None) } else { text.parse().map(Some).map_err(|error: T::Err| error.to_string()) }
}

/// Reads a number of bytes: `500MB`, `2GiB`, `4096`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let units = [("", 0, 0), ("K", 3, 10), ("M", 6, 20), ("G", 9, 30), ("T", 12, 40)];
    let factor = units.into_iter().find_map(|(prefix, ten, two)| {
        let of = |ending: &str| unit.trim().eq_ignore_ascii_case(&format!("{prefix}{ending}"));
        let plain = prefix.is_empty() && of("");
        (plain || of("B")).then(|| 10f64.powi(ten)).or_else(|| (!prefix.is_empty() && of("iB")).then(|| 2f64.powi(two)))
    });
    let bytes = number.parse::<f64>().ok().zip(factor).map(|(number, factor)| number * factor);
    // Beyond these, f64 counts no single bytes.
    bytes
        .filter(|bytes| *bytes < 9e15)
        .map(|bytes| bytes as u64)
        .ok_or_else(|| "expected a number of bytes, such as 500MB, 2GiB or 4096".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_with_their_units() {
        let read = [("4096", 4096), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("1.5kb", 1500), ("0", 0), ("3B", 3)];
        for (text, expected) in read {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GB", "-1", "1.2.3", "5 apples", "2G", "1e3", "99999999TB"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
