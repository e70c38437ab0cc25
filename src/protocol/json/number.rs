//! Exact decimal values of numbers.

/// A number, split into its parts but not evaluated.
pub(super) struct Number<'a> {
    pub(super) text: &'a str,
    pub(super) negative: bool,
    pub(super) integer: &'a str,
    /// The digits after the point; may be empty.
    pub(super) fraction: &'a str,
    /// The exponent with its sign, if it has one.
    pub(super) exponent: &'a str,
}

/// The number `digits` × 10^`exponent`. The concatenated digits neither start nor end with a zero,
/// so every value has exactly one such form. Zero has no digits.
pub(super) struct Decimal<'a> {
    pub(super) digits: [&'a str; 2],
    pub(super) exponent: i64,
}

impl<'a> Number<'a> {
    /// Returns the decimal value. Returns `None` if the exponent does not fit.
    pub(super) fn decimal(&self) -> Option<Decimal<'a>> {
        let fraction = self.fraction.trim_end_matches('0');
        // The last zeros of the integer can become part of the exponent if no other digit follows
        // them.
        let integer = if fraction.is_empty() {
            self.integer.trim_end_matches('0')
        } else {
            self.integer
        };
        if integer.is_empty() && fraction.is_empty() {
            return Some(Decimal {
                digits: ["", ""],
                exponent: 0,
            });
        }
        let raised = i64::try_from(self.integer.len() - integer.len()).ok()?;
        let lowered = i64::try_from(fraction.len()).ok()?;
        let exponent: i64 = self.exponent.parse().ok()?;
        // At most one of the two is not zero. Therefore no intermediate result overflows if the
        // final result fits.
        let exponent = exponent.checked_add(raised)?.checked_sub(lowered)?;
        // "Leading zeros are not allowed", so there is at most a single zero before the point.
        let digits = if integer == "0" {
            ["", fraction.trim_start_matches('0')]
        } else {
            [integer, fraction]
        };
        Some(Decimal { digits, exponent })
    }
}
