//! The environment variables by which a person sets the length of the tests.

use std::ops::Range;

/// Whether tests that repeat a fault many times run at full length, which `./test all` sets with
/// `THOROUGH=1`.
pub(crate) fn is_thorough() -> bool {
    std::env::var_os("THOROUGH").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Returns the whole number in an environment variable.
pub(crate) fn number(variable: &str, smallest: u64) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    let number = value.parse().ok().filter(|number| *number >= smallest);
    Some(number.unwrap_or_else(|| panic!("{variable} must be a whole number of at least {smallest}, and is {value}")))
}

/// Returns the seeds that an environment variable names: a number of seeds, or a range.
pub(crate) fn seeds(variable: &str) -> Option<Range<u64>> {
    let value = std::env::var(variable).ok()?;
    let (first, end) = value.split_once("..").unwrap_or(("0", &value));
    let range = first.parse().ok().zip(end.parse().ok());
    let range = range.map(|(first, end)| first..end).filter(|range| !range.is_empty());
    Some(range.unwrap_or_else(|| {
        panic!(
            "{variable} must be a number or a range with at least one seed, such as 1000 or 1000..2000, and is {value}"
        )
    }))
}
