//! The deadline that a gRPC client sends along.

use std::time::Duration;

use tonic::metadata::MetadataMap;

use crate::error::{GeneratorError, invalid};

pub(crate) const HEADER: &str = "grpc-timeout";

/// The time that a call may take: at most 8 digits and a unit, as "gRPC over HTTP/2" writes it.
///
/// # Errors
/// If the client sent none, it is malformed, or it has passed: without one, a lost client would keep its request running.
pub(crate) fn timeout(metadata: &MetadataMap) -> Result<Duration, GeneratorError> {
    let value = metadata.get(HEADER).ok_or_else(|| invalid(HEADER, "is missing: the call needs a deadline"))?;
    let text = value.to_str().unwrap_or_default();
    match parse(text) {
        Some(Duration::ZERO) => Err(GeneratorError::Late),
        Some(timeout) => Ok(timeout),
        None => Err(invalid(HEADER, format!("must be at most 8 digits and one of H M S m u n, got {text:?}"))),
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_refused(value: Option<&'static str>, expect: &str) {
        let mut metadata = MetadataMap::new();
        if let Some(value) = value {
            metadata.insert(HEADER, value.parse().unwrap());
        }
        let error = timeout(&metadata).unwrap_err().to_string();
        assert!(error.starts_with("grpc-timeout: ") && error.contains(expect), "{error}");
    }

    #[test]
    fn a_call_without_time_is_refused() {
        check_refused(None, "is missing");
        check_refused(Some("0m"), "had passed");
        check_refused(Some("-1S"), r#"got "-1S""#);
    }

    #[test]
    fn every_unit_is_read_and_nonsense_is_refused() {
        for (text, expect) in [
            ("2H", Some(Duration::from_secs(7200))),
            ("3M", Some(Duration::from_secs(180))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("5m", Some(Duration::from_millis(5))),
            ("7u", Some(Duration::from_micros(7))),
            ("7n", Some(Duration::from_nanos(7))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("+1S", None),
            ("1é", None),
            ("1x", None),
        ] {
            assert_eq!(parse(text), expect, "{text:?}");
        }
    }
}
