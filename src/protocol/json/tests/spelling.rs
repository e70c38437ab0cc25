//! Writes documents in many spellings.

use super::model::Json;

/// Writes a document in one of its many spellings.
pub(super) struct Spelling {
    state: u64,
}

impl Spelling {
    /// Returns a number below `bound`. The generator is xorshift64, so all choices follow from the
    /// one seed that proptest prints.
    fn below(&mut self, bound: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state % u64::try_from(bound).unwrap()).unwrap()
    }

    pub(super) fn spell(seed: u64, value: &Json) -> String {
        let mut text = String::new();
        let mut spelling = Self { state: seed | 1 };
        spelling.token(&mut text, "");
        spelling.value(&mut text, value);
        text
    }

    fn token(&mut self, text: &mut String, token: &str) {
        text.push_str(token);
        for _ in 0..self.below(3) {
            text.push_str(["", " ", "\t", "\r\n"][self.below(4)]);
        }
    }

    fn value(&mut self, text: &mut String, value: &Json) {
        match value {
            Json::Literal(b'n') => text.push_str("null"),
            Json::Literal(b't') => text.push_str("true"),
            Json::Literal(_) => text.push_str("false"),
            Json::Number(negative, digits, exponent) => self.number(text, *negative, digits, *exponent),
            Json::Text(number) => text.push_str(number),
            Json::String(string) => self.string(text, string),
            Json::Array(elements) => {
                self.token(text, "[");
                for (at, element) in elements.iter().enumerate() {
                    if at > 0 {
                        self.token(text, ",");
                    }
                    self.value(text, element);
                }
                self.token(text, "]");
            }
            Json::Object(members) => self.object(text, members),
        }
        self.token(text, "");
    }

    fn object(&mut self, text: &mut String, members: &[(String, Json)]) {
        self.token(text, "{");
        for (at, (name, value)) in self.shuffled(members).iter().enumerate() {
            if at > 0 {
                self.token(text, ",");
            }
            self.string(text, name);
            self.token(text, "");
            self.token(text, ":");
            self.value(text, value);
        }
        self.token(text, "}");
    }

    /// Shuffles members, but leaves members of the same name in their order.
    fn shuffled(&mut self, members: &[(String, Json)]) -> Vec<(String, Json)> {
        let mut left = members.to_vec();
        let mut shuffled = Vec::new();
        while !left.is_empty() {
            let at = self.below(left.len());
            let first = left.iter().position(|(name, _)| *name == left[at].0).unwrap();
            shuffled.push(left.remove(first));
        }
        shuffled
    }

    fn string(&mut self, text: &mut String, string: &str) {
        text.push('"');
        for char in string.chars() {
            let short = match char {
                '"' | '\\' | '/' => Some(char),
                '\u{8}' => Some('b'),
                '\u{c}' => Some('f'),
                '\n' => Some('n'),
                '\r' => Some('r'),
                '\t' => Some('t'),
                _ => None,
            };
            let raw = !matches!(char, '"' | '\\' | ..='\u{1f}');
            match (self.below(4), short) {
                (0..=1, _) if raw => text.push(char),
                (0..=2, Some(short)) => text.extend(['\\', short]),
                _ => {
                    for unit in char.encode_utf16(&mut [0; 2]) {
                        let capitals = self.below(2) == 0;
                        text.push_str(&if capitals {
                            format!("\\u{unit:04X}")
                        } else {
                            format!("\\u{unit:04x}")
                        });
                    }
                }
            }
        }
        text.push('"');
    }

    fn number(&mut self, text: &mut String, negative: bool, digits: &str, exponent: i64) {
        if negative {
            text.push('-');
        }
        // Leading zeros are not allowed. Therefore zero itself starts with one digit and gets no
        // trailing zeros.
        let (digits, zeros) = if digits.is_empty() {
            ("0", 0)
        } else {
            (digits, self.below(4))
        };
        let mut digits = format!("{digits}{}", "0".repeat(zeros));
        let mut exponent = exponent - i64::try_from(zeros).unwrap();
        // The number of places by which the point moves to the left.
        let places = self.below(digits.len() + 4);
        exponent += i64::try_from(places).unwrap();
        if digits.len() <= places {
            digits.insert_str(0, &"0".repeat(places + 1 - digits.len()));
        }
        let (integer, fraction) = digits.split_at(digits.len() - places);
        text.push_str(integer);
        if !fraction.is_empty() {
            text.push('.');
            text.push_str(fraction);
        }
        let zero = digits.bytes().all(|digit| digit == b'0');
        if zero || exponent != 0 || self.below(2) == 0 {
            let sign = if exponent < 0 { "-" } else { ["", "+"][self.below(2)] };
            let padding = "0".repeat(self.below(3));
            text.push_str(&format!(
                "{}{sign}{padding}{}",
                ["e", "E"][self.below(2)],
                exponent.unsigned_abs()
            ));
        }
    }
}
