//! The seeds of a test.

use std::ops::Range;

/// Returns the seeds that an environment variable names: a number, or a range.
pub(crate) fn seeds(variable: &str) -> Option<Range<u64>> {
    let value = std::env::var(variable).ok()?;
    let (first, end) = value.split_once("..").unwrap_or(("0", &value));
    let number = |text: &str| {
        text.parse().unwrap_or_else(|_| {
            panic!("{variable} must be a number or a range, such as 1000 or 1000..2000, and is {value}")
        })
    };
    Some(number(first)..number(end))
}
