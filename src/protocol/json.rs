//! Canonical JSON for fingerprints: the same document, however it was written, gives the same bytes; any other
//! document gives other bytes.
//!
//! Two passes over the text, neither of which builds a tree. The first checks all of it against RFC 8259 and notes
//! where the members of each object are, sorted by name; the second follows these notes and writes the canonical form.
//! Both read with the same [`Cursor`], which trusts nothing, so the second pass cannot stumble where the first did not.
//! Time is that of the sorting, memory 16 bytes per object and per member, recursion ends at [`MAX_DEPTH`].
//!
//! The canonical form is prefix-free and can be decoded (the tests do), hence injective:
//!
//! | value | bytes |
//! |---|---|
//! | `null`, `true`, `false` | `n`, `t`, `f` |
//! | string | `"`, the UTF-8 of its characters, `FF` (which UTF-8 never contains) |
//! | number: integer *d* × 10^*x* | `#`, sign, *d* without zeros at either end, `e`, *x* as big-endian `i64` |
//! | the same if *x* is 0 | `#`, sign, *d*, `;` |
//! | the same if *x* does not fit | `~`, the text as sent, `FF` |
//! | array | `[`, its elements, `]` |
//! | object | `{`, name and value of each member sorted by name, `}` |

use std::cmp::Ordering;
use std::ops::Range;

use crate::error::{Error, ErrorKind};

/// How many arrays and objects may lie in one another.
const MAX_DEPTH: usize = 128;

/// How many bytes are collected before the sink is called: hashing byte by byte would be slow.
const CHUNK: usize = 4096;

/// Ends a string or a number's text; no UTF-8 text contains this byte.
const END: u8 = 0xff;

/// Fingerprints of JSON bodies by what they say instead of how they are written.
///
/// Two bodies count as the same request when they differ only in
///
/// * white space between the tokens,
/// * the order of the members of an object,
/// * the escapes in a string (`"\u0061"` is `"a"`),
/// * the spelling of a number of the same exact decimal value (`1.0`, `1`, `10e-1`; no rounding ever takes place),
/// * the members and elements that are [left out](Self::leave_out).
///
/// Everything else counts: the order of an array, the case of a name, the type of a value, every digit of a number. In
/// doubt two bodies are different, since a wrong "different" refuses a retry while a wrong "same" answers a request
/// that was never made:
///
/// * `-0` is not `0`. The two are equal numbers, but many parsers tell them apart, by sign or even by type.
/// * A member that occurs twice counts twice, in the order sent: parsers disagree on which of them wins.
/// * Exponents that do not fit 64 bits are compared as text.
/// * Strings are compared character by character, without Unicode normalization.
///
/// A body that is not JSON (RFC 8259), holds half a surrogate pair, nests arrays and objects deeper than 128 levels or
/// is longer than 4 GiB is fingerprinted by its bytes.
///
/// # Defaults
///
/// Nothing is left out.
#[derive(Clone, Debug, Default)]
pub struct CanonicalJson {
    left_out: LeftOut,
}

impl CanonicalJson {
    /// Canonical JSON of the whole body.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Leaves out what `pointer` (a JSON pointer, RFC 6901) names, as if it had never been sent. Default: nothing.
    ///
    /// For members that change with every retry, such as a time of sending: `/sent_at`, `/meta/trace`,
    /// `/items/0/nonce`. Of a member that occurs twice every occurrence is left out. Indexes count the elements as they
    /// were sent, however many of them are left out; `-` names no element. A pointer that names nothing in a body
    /// changes nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`] when `pointer` is no JSON pointer, when it is empty and so names the whole body, or
    /// when it is longer than the 128 steps that bodies may be deep.
    pub fn leave_out(mut self, pointer: &str) -> Result<Self, Error> {
        let Some(steps) = pointer.strip_prefix('/') else {
            return Err(invalid_pointer(
                "a JSON pointer to leave out starts with a slash and names a member or element",
            ));
        };
        let steps = steps.split('/').map(unescaped_step).collect::<Option<Vec<_>>>();
        let steps = steps.ok_or_else(|| invalid_pointer("a tilde in a JSON pointer is written ~0, a slash ~1"))?;
        if steps.len() > MAX_DEPTH {
            return Err(invalid_pointer("a JSON pointer to leave out has at most 128 steps"));
        }
        self.left_out.add(steps);
        Ok(self)
    }

    /// Feeds the canonical form of `body` to `sink` and returns true; returns false, having fed nothing, when `body`
    /// has none, so that the caller falls back to the bytes.
    ///
    /// The form is meant to be hashed behind an algorithm id of its own: some other body may consist of these very
    /// bytes.
    pub(crate) fn feed(&self, body: &[u8], sink: &mut dyn FnMut(&[u8])) -> bool {
        // RFC 8259, section 8.1: "JSON text exchanged between systems that are not part of a closed ecosystem MUST be
        // encoded using UTF-8".
        let Some(notes) = std::str::from_utf8(body).ok().and_then(Notes::of) else {
            return false;
        };
        let mut writer = Writer::new(&notes, sink);
        let written = writer.value(Some(&self.left_out));
        debug_assert!(written.is_some(), "the second pass reads what the first has read");
        writer.output.flush();
        true
    }
}

fn invalid_pointer(what: &'static str) -> Error {
    Error::new(ErrorKind::Configuration, what)
}

/// RFC 6901, section 3: `escaped = "~" ( "0" / "1" )`, where `~0` stands for `~` and `~1` for `/`.
fn unescaped_step(step: &str) -> Option<String> {
    let mut chars = step.chars();
    let mut unescaped = String::with_capacity(step.len());
    while let Some(char) = chars.next() {
        unescaped.push(match char {
            '~' => match chars.next()? {
                '0' => '~',
                '1' => '/',
                _ => return None,
            },
            other => other,
        });
    }
    Some(unescaped)
}

/// The pointers to leave out, as a tree; at most [`MAX_DEPTH`] levels.
#[derive(Clone, Debug, Default)]
struct LeftOut {
    whole: bool,
    below: Vec<Step>,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    /// The array index that `name` spells, if it spells one.
    index: Option<usize>,
    to: LeftOut,
}

impl LeftOut {
    fn add(&mut self, steps: Vec<String>) {
        let mut place = self;
        for name in steps {
            let known = place.below.iter().position(|step| step.name == name);
            let at = known.unwrap_or_else(|| {
                place.below.push(Step::new(name));
                place.below.len() - 1
            });
            place = &mut place.below[at].to;
        }
        place.whole = true;
    }

    fn member(&self, name: Quoted<'_>) -> Option<&Self> {
        self.below.iter().find(|step| name.is(&step.name)).map(|step| &step.to)
    }

    fn element(&self, index: usize) -> Option<&Self> {
        self.below
            .iter()
            .find(|step| step.index == Some(index))
            .map(|step| &step.to)
    }
}

impl Step {
    fn new(name: String) -> Self {
        // RFC 6901, section 4: an index is written "%x30 / ( %x31-39 *(%x30-39) )", so neither "01" nor "+1" is one.
        let index = name.parse().ok().filter(|index: &usize| index.to_string() == name);
        Self {
            name,
            index,
            to: LeftOut::default(),
        }
    }
}

/// What the first pass has noted: the text, and for each object that has members where they are.
struct Notes<'a> {
    text: &'a str,
    /// In the order of their opening braces.
    objects: Vec<Object>,
    /// Those of one object lie together, sorted by name; members of the same name keep the order in which they were
    /// sent.
    members: Vec<Member>,
}

/// Offsets are of 32 bits, as are those below, to halve the memory that a hostile body can ask for.
#[derive(Clone, Copy)]
struct Object {
    start: u32,
    end: u32,
    first_member: u32,
    members_end: u32,
}

#[derive(Clone, Copy)]
struct Member {
    /// Between the quotes.
    name: (u32, u32),
    name_is_escaped: bool,
    value: u32,
}

impl<'a> Notes<'a> {
    fn of(text: &'a str) -> Option<Self> {
        let mut reader = Reader {
            cursor: Cursor { text, at: 0 },
            notes: Self {
                text,
                objects: Vec::new(),
                members: Vec::new(),
            },
            open: Vec::new(),
            depth: 0,
        };
        reader.value()?;
        reader.cursor.token().is_none().then_some(reader.notes)
    }

    fn object_at(&self, start: usize) -> Option<Object> {
        let found = self
            .objects
            .binary_search_by_key(&start, |object| wide(object.start))
            .ok()?;
        self.objects.get(found).copied()
    }
}

impl Object {
    fn members(self) -> Range<usize> {
        wide(self.first_member)..wide(self.members_end)
    }
}

impl Member {
    fn name<'a>(&self, text: &'a str) -> Quoted<'a> {
        let (start, end) = self.name;
        Quoted {
            content: text.get(wide(start)..wide(end)).unwrap_or_default(),
            escaped: self.name_is_escaped,
        }
    }
}

fn narrow(offset: usize) -> Option<u32> {
    u32::try_from(offset).ok()
}

fn wide(offset: u32) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// The first pass. Every method returns `None` at the first byte that is not JSON.
struct Reader<'a> {
    cursor: Cursor<'a>,
    notes: Notes<'a>,
    /// The members read so far of the objects that are still open.
    open: Vec<Member>,
    depth: usize,
}

impl Reader<'_> {
    fn value(&mut self) -> Option<()> {
        match self.cursor.token()? {
            b'[' => self.nested(Self::array),
            b'{' => self.nested(Self::object),
            _ => self.cursor.scalar().map(drop),
        }
    }

    /// RFC 8259, section 9: "An implementation may set limits on the maximum depth of nesting."
    fn nested(&mut self, read: fn(&mut Self) -> Option<()>) -> Option<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        read(self)?;
        self.depth -= 1;
        Some(())
    }

    fn array(&mut self) -> Option<()> {
        self.cursor.expect(b'[')?;
        if self.cursor.skip(b']') {
            return Some(());
        }
        loop {
            self.value()?;
            if self.cursor.skip(b']') {
                return Some(());
            }
            self.cursor.expect(b',')?;
        }
    }

    fn object(&mut self) -> Option<()> {
        let start = narrow(self.cursor.at)?;
        self.cursor.expect(b'{')?;
        if self.cursor.skip(b'}') {
            return Some(());
        }
        let object = self.notes.objects.len();
        self.notes.objects.push(Object {
            start,
            end: start,
            first_member: 0,
            members_end: 0,
        });
        let first = self.open.len();
        loop {
            self.member()?;
            if self.cursor.skip(b'}') {
                return self.close(object, first);
            }
            self.cursor.expect(b',')?;
        }
    }

    fn member(&mut self) -> Option<()> {
        self.cursor.token()?;
        let before = self.cursor.at;
        let name = self.cursor.string()?;
        let name_is_escaped = name.escaped;
        let name = (narrow(before + 1)?, narrow(self.cursor.at - 1)?);
        self.cursor.expect(b':')?;
        self.cursor.token()?;
        self.open.push(Member {
            name,
            name_is_escaped,
            value: narrow(self.cursor.at)?,
        });
        self.value()
    }

    fn close(&mut self, object: usize, first: usize) -> Option<()> {
        let text = self.notes.text;
        let own = self.open.get_mut(first..)?;
        // A stable sort: of the members of one name the order stays, as it decides which of them a parser takes.
        own.sort_by(|one, other| one.name(text).compare(other.name(text)));
        let noted = self.notes.objects.get_mut(object)?;
        noted.first_member = narrow(self.notes.members.len())?;
        self.notes.members.extend(self.open.drain(first..));
        noted.members_end = narrow(self.notes.members.len())?;
        noted.end = narrow(self.cursor.at)?;
        Some(())
    }
}

/// The second pass: goes through the text in canonical order and writes.
struct Writer<'a, 's> {
    cursor: Cursor<'a>,
    notes: &'a Notes<'a>,
    output: Output<'s>,
}

impl<'a, 's> Writer<'a, 's> {
    fn new(notes: &'a Notes<'a>, sink: &'s mut dyn FnMut(&[u8])) -> Self {
        Self {
            cursor: Cursor {
                text: notes.text,
                at: 0,
            },
            notes,
            output: Output {
                buffer: Vec::new(),
                sink,
                mute: false,
            },
        }
    }

    fn value(&mut self, left_out: Option<&LeftOut>) -> Option<()> {
        match self.cursor.token()? {
            b'[' => self.array(left_out),
            b'{' => self.object(left_out),
            _ => {
                match self.cursor.scalar()? {
                    Scalar::Literal(tag) => self.output.write(&[tag]),
                    Scalar::Number(number) => self.output.number(&number),
                    Scalar::String(string) => self.output.string(string),
                }
                Some(())
            }
        }
    }

    fn array(&mut self, left_out: Option<&LeftOut>) -> Option<()> {
        self.cursor.expect(b'[')?;
        self.output.write(b"[");
        let mut index = 0;
        while !self.cursor.skip(b']') {
            self.element(left_out.and_then(|left_out| left_out.element(index)))?;
            self.cursor.skip(b',');
            index += 1;
        }
        self.output.write(b"]");
        Some(())
    }

    fn element(&mut self, left_out: Option<&LeftOut>) -> Option<()> {
        let mute = self.output.mute;
        self.output.mute |= left_out.is_some_and(|left_out| left_out.whole);
        self.value(left_out)?;
        self.output.mute = mute;
        Some(())
    }

    fn object(&mut self, left_out: Option<&LeftOut>) -> Option<()> {
        let start = self.cursor.at;
        self.output.write(b"{");
        self.cursor.expect(b'{')?;
        if !self.cursor.skip(b'}') {
            let object = self.notes.object_at(start)?;
            for member in self.notes.members.get(object.members())? {
                self.member(member, left_out)?;
            }
            self.cursor.at = wide(object.end);
        }
        self.output.write(b"}");
        Some(())
    }

    fn member(&mut self, member: &Member, left_out: Option<&LeftOut>) -> Option<()> {
        let name = member.name(self.notes.text);
        let left_out = left_out.and_then(|left_out| left_out.member(name));
        if left_out.is_some_and(|left_out| left_out.whole) {
            return Some(());
        }
        self.output.string(name);
        self.cursor.at = wide(member.value);
        self.value(left_out)
    }
}

/// Hands the canonical bytes to the sink in chunks.
struct Output<'s> {
    buffer: Vec<u8>,
    sink: &'s mut dyn FnMut(&[u8]),
    /// While an element that is left out is passed over.
    mute: bool,
}

impl Output<'_> {
    fn string(&mut self, string: Quoted<'_>) {
        self.write(b"\"");
        if string.escaped {
            for char in string.chars() {
                self.write(char.encode_utf8(&mut [0; 4]).as_bytes());
            }
        } else {
            self.write(string.content.as_bytes());
        }
        self.write(&[END]);
    }

    fn number(&mut self, number: &Number<'_>) {
        let Some(decimal) = number.decimal() else {
            self.write(b"~");
            self.write(number.text.as_bytes());
            return self.write(&[END]);
        };
        self.write(if number.negative { b"#-" } else { b"#+" });
        for digits in decimal.digits {
            self.write(digits.as_bytes());
        }
        if decimal.exponent == 0 {
            self.write(b";");
        } else {
            self.write(b"e");
            self.write(&decimal.exponent.to_be_bytes());
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.mute {
            return;
        }
        if self.buffer.len() + bytes.len() > CHUNK {
            self.flush();
        }
        if bytes.len() > CHUNK {
            (self.sink)(bytes);
        } else {
            self.buffer.extend_from_slice(bytes);
        }
    }

    fn flush(&mut self) {
        (self.sink)(&self.buffer);
        self.buffer.clear();
    }
}

enum Scalar<'a> {
    /// The first letter of `false`, `null` or `true`.
    Literal(u8),
    Number(Number<'a>),
    String(Quoted<'a>),
}

/// Reads tokens. Methods that return `None` have met something else than what they read.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next byte that is not white space, where the cursor then stands; `None` at the end.
    fn token(&mut self) -> Option<u8> {
        // RFC 8259, section 2: "Insignificant whitespace is allowed before or after any of the six structural
        // characters."
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
        self.peek()
    }

    fn skip(&mut self, token: u8) -> bool {
        self.token() == Some(token) && self.take(|_| true)
    }

    fn expect(&mut self, token: u8) -> Option<()> {
        self.skip(token).then_some(())
    }

    fn scalar(&mut self) -> Option<Scalar<'a>> {
        match self.peek()? {
            b'"' => self.string().map(Scalar::String),
            b'-' | b'0'..=b'9' => self.number().map(Scalar::Number),
            b'f' => self.literal("false"),
            b'n' => self.literal("null"),
            b't' => self.literal("true"),
            _ => None,
        }
    }

    fn literal(&mut self, word: &'static str) -> Option<Scalar<'a>> {
        let read = self.rest().starts_with(word);
        self.at += word.len();
        read.then_some(Scalar::Literal(*word.as_bytes().first()?))
    }

    /// RFC 8259, section 7: "All Unicode characters may be placed within the quotation marks, except for the characters
    /// that MUST be escaped: quotation mark, reverse solidus, and the control characters (U+0000 through U+001F)."
    fn string(&mut self) -> Option<Quoted<'a>> {
        self.expect(b'"')?;
        let start = self.at;
        let mut escaped = false;
        loop {
            let rest = self.rest().as_bytes();
            self.at += rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | ..=0x1f))?;
            match self.peek()? {
                b'"' => break,
                b'\\' => self.at += escape(self.rest())?.1,
                _ => return None,
            }
            escaped = true;
        }
        let content = self.text.get(start..self.at)?;
        self.at += 1;
        Some(Quoted { content, escaped })
    }

    /// RFC 8259, section 6: `number = [ minus ] int [ frac ] [ exp ]`.
    fn number(&mut self) -> Option<Number<'a>> {
        let start = self.at;
        let negative = self.take(|byte| byte == b'-');
        let integer = self.digits()?;
        // "Leading zeros are not allowed."
        if integer.len() > 1 && integer.starts_with('0') {
            return None;
        }
        let fraction = if self.take(|byte| byte == b'.') {
            self.digits()?
        } else {
            ""
        };
        let exponent = if self.take(|byte| matches!(byte, b'e' | b'E')) {
            self.exponent()?
        } else {
            "0"
        };
        Some(Number {
            text: self.text.get(start..self.at)?,
            negative,
            integer,
            fraction,
            exponent,
        })
    }

    fn exponent(&mut self) -> Option<&'a str> {
        let start = self.at;
        self.take(|byte| matches!(byte, b'+' | b'-'));
        self.digits()?;
        self.text.get(start..self.at)
    }

    fn digits(&mut self) -> Option<&'a str> {
        let start = self.at;
        while self.take(|byte| byte.is_ascii_digit()) {}
        self.text.get(start..self.at).filter(|digits| !digits.is_empty())
    }

    fn take(&mut self, accepts: impl Fn(u8) -> bool) -> bool {
        let taken = self.peek().is_some_and(accepts);
        self.at += usize::from(taken);
        taken
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }
}

/// What stands between the quotes of a string, escapes and all.
#[derive(Clone, Copy)]
struct Quoted<'a> {
    content: &'a str,
    escaped: bool,
}

impl<'a> Quoted<'a> {
    fn is(self, string: &str) -> bool {
        if self.escaped {
            self.chars().eq(string.chars())
        } else {
            self.content == string
        }
    }

    /// By code points, which is also the order of the UTF-8 bytes.
    fn compare(self, other: Self) -> Ordering {
        if self.escaped || other.escaped {
            self.chars().cmp(other.chars())
        } else {
            self.content.cmp(other.content)
        }
    }

    fn chars(self) -> impl Iterator<Item = char> + 'a {
        let mut rest = self.content;
        std::iter::from_fn(move || {
            let (char, length) = match rest.chars().next()? {
                '\\' => escape(rest)?,
                plain => (plain, plain.len_utf8()),
            };
            rest = rest.get(length..)?;
            Some(char)
        })
    }
}

/// The character that the escape at the start of `text` stands for, and the length of the escape.
fn escape(text: &str) -> Option<(char, usize)> {
    let char = match text.as_bytes().get(1)? {
        b'"' => '"',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return code_point(text),
        _ => return None,
    };
    Some((char, 2))
}

/// RFC 8259, section 7: a character outside the Basic Multilingual Plane is "a 12-character sequence, encoding the
/// UTF-16 surrogate pair". Half a pair is no character, hence no string here; section 8.2 calls such texts
/// unpredictable.
fn code_point(text: &str) -> Option<(char, usize)> {
    let first = code_unit(text)?;
    if let Some(char) = char::from_u32(u32::from(first)) {
        return Some((char, 6));
    }
    let second = code_unit(text.get(6..)?)?;
    let char = char::decode_utf16([first, second]).next()?.ok()?;
    Some((char, 12))
}

fn code_unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.as_bytes().get(..4)?;
    digits.iter().try_fold(0, |unit: u16, &digit| {
        let digit = char::from(digit).to_digit(16)?;
        Some((unit << 4) | u16::try_from(digit).ok()?)
    })
}

/// A number, taken apart but not evaluated.
struct Number<'a> {
    text: &'a str,
    negative: bool,
    integer: &'a str,
    /// Behind the point; may be empty.
    fraction: &'a str,
    /// With its sign, if it has one.
    exponent: &'a str,
}

/// The number `digits` times ten to the power of `exponent`; the digits, concatenated, neither start nor end with a
/// zero, so that every value has exactly one such form. Zero has no digits.
struct Decimal<'a> {
    digits: [&'a str; 2],
    exponent: i64,
}

impl<'a> Number<'a> {
    /// `None` when the exponent does not fit.
    fn decimal(&self) -> Option<Decimal<'a>> {
        let fraction = self.fraction.trim_end_matches('0');
        // The last zeros of the integer can become part of the exponent if no other digit follows them.
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
        // At most one of the two is not zero, so that no intermediate result overflows where the last would fit.
        let exponent = exponent.checked_add(raised)?.checked_sub(lowered)?;
        // "Leading zeros are not allowed": before the point there is a single one or none.
        let digits = if integer == "0" {
            ["", fraction.trim_start_matches('0')]
        } else {
            [integer, fraction]
        };
        Some(Decimal { digits, exponent })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use proptest::sample::{select, Index};
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    use serde::de::IgnoredAny;

    use super::*;

    fn fed(settings: &CanonicalJson, body: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut calls = 0;
        let fed = settings.feed(body, &mut |chunk| {
            calls += 1;
            bytes.extend_from_slice(chunk);
        });
        assert_eq!(fed, calls > 0, "nothing is fed for a body that is not JSON");
        fed.then_some(bytes)
    }

    fn canonical(body: &str) -> Option<Vec<u8>> {
        fed(&CanonicalJson::new(), body.as_bytes())
    }

    fn leaving_out(pointers: &[&str]) -> CanonicalJson {
        pointers.iter().fold(CanonicalJson::new(), |settings, pointer| {
            settings.leave_out(pointer).unwrap()
        })
    }

    #[track_caller]
    fn assert_same(bodies: &[&str]) {
        for body in bodies {
            assert!(canonical(body).is_some(), "{body}");
            assert_eq!(canonical(bodies[0]), canonical(body), "{} and {body}", bodies[0]);
        }
    }

    #[track_caller]
    fn assert_all_different(bodies: &[&str]) {
        for (at, one) in bodies.iter().enumerate() {
            assert!(canonical(one).is_some(), "{one}");
            for other in &bodies[at + 1..] {
                assert_ne!(canonical(one), canonical(other), "{one} and {other}");
            }
        }
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let form = canonical(r#" { "b" : [ null, true, false, 0 ], "a" : -12.50, "c" : 1e99999999999999999999 } "#);
        let expected = [
            b"{\"a\xff#-125e" as &[u8],
            &(-1_i64).to_be_bytes(),
            b"\"b\xff[ntf#+;]\"c\xff~1e99999999999999999999\xff}",
        ];
        assert_eq!(form.unwrap(), expected.concat());
    }

    #[test]
    fn spelling_does_not_matter() {
        assert_same(&[r#"{"a":1,"b":[]}"#, "\t{\r\n \"b\" : [ ] ,\"a\": 1 } "]);
        assert_same(&[r#""a/é😀\n""#, r#""\u0061\/\u00e9\uD83d\ude00\u000A""#]);
        assert_same(&[r#"{"a":1,"\u0062":2}"#, r#"{"b":2,"\u0061":1}"#]);
    }

    #[test]
    fn meaning_matters() {
        assert_all_different(&[
            "1",
            "\"1\"",
            "[1]",
            "{\"1\":1}",
            "null",
            "true",
            "false",
            "\"null\"",
            "[]",
            "{}",
            "[[]]",
        ]);
        assert_all_different(&["[1,2]", "[2,1]", "[12]", "[[1],2]", "[1,[2]]", "[[1,2]]", "[1,2,2]"]);
        assert_all_different(&[
            r#"{"a":1}"#,
            r#"{"A":1}"#,
            r#"{"a":{}}"#,
            r#"{"a":1,"b":null}"#,
            r#"{"a\u0000":1}"#,
        ]);
        assert_all_different(&[
            r#"{"a":{"b":1}}"#,
            r#"{"a":{},"b":1}"#,
            r#"{"b":{"a":1}}"#,
            r#"{"a":["b",1]}"#,
        ]);
        // Composed and decomposed: JSON knows no normalization.
        assert_all_different(&[r#""é""#, r#""e\u0301""#]);
    }

    #[test]
    fn duplicate_members_all_count_in_their_order() {
        assert_all_different(&[
            r#"{"a":1,"a":2}"#,
            r#"{"a":2,"a":1}"#,
            r#"{"a":1}"#,
            r#"{"a":2}"#,
            r#"{"a":[1,2]}"#,
        ]);
        assert_same(&[r#"{"a":1,"b":0,"a":2}"#, r#"{"b":0,"a":1,"\u0061":2}"#]);
    }

    #[test]
    fn many_duplicate_members_keep_their_order() {
        let body = |values: &[usize]| {
            let members = values
                .iter()
                .map(|value| format!("\"{}\":{value}", ["b", "a", "\\u0061"][value % 3]));
            format!("{{{}}}", members.collect::<Vec<_>>().join(","))
        };
        let values: Vec<_> = (1..1000).collect();
        let Json::Object(members) = decode(&canonical(&body(&values)).unwrap()) else {
            panic!("an object was sent")
        };
        let names_in_order = values
            .iter()
            .filter(|&value| value % 3 > 0)
            .chain(values.iter().filter(|&value| value % 3 == 0));
        for ((_, value), expected) in members.iter().zip(names_in_order) {
            let expected = decode(&canonical(&expected.to_string()).unwrap());
            assert_eq!(*value, expected);
        }
    }

    #[test]
    fn every_byte_is_judged_as_serde_json_does() {
        for byte in 0..=u8::MAX {
            for (before, after) in [
                ("", ""),
                ("1", ""),
                ("", "1"),
                ("\"", "\""),
                ("\"\\", "\""),
                ("\"\\u00", "0\""),
            ] {
                let body = [before.as_bytes(), &[byte], after.as_bytes()].concat();
                let expected = serde_json::from_slice::<serde_json::Value>(&body).is_ok();
                assert_eq!(
                    fed(&CanonicalJson::new(), &body).is_some(),
                    expected,
                    "{}",
                    body.escape_ascii()
                );
            }
        }
    }

    #[test]
    fn numbers_compare_by_exact_decimal_value() {
        assert_same(&[
            "1", "1.0", "10e-1", "1E0", "1e+0", "1e-00", "0.1e1", "0.001e3", "100e-2",
        ]);
        assert_same(&["1200", "12e2", "1.2E+3", "0.0012e6", "12000.00e-1"]);
        assert_same(&["-0.5", "-5e-1", "-0.50"]);
        assert_all_different(&["12345678901234567890123", "12345678901234567890124"]);
        assert_all_different(&[
            "0.1",
            "0.10000000000000000000000000000000000000001",
            "1",
            "10",
            "-1",
            "101",
            "1001",
        ]);
        assert_all_different(&["1e400", "1e401", "1e-400", "1e-401", "0"]);
    }

    #[test]
    fn minus_zero_is_zero_of_another_sign() {
        assert_same(&["0", "0.00", "0e5", "0e99999999999999999999", "0.0E-7"]);
        assert_same(&["-0", "-0.0", "-0e1"]);
        assert_all_different(&["0", "-0"]);
        // The reason: a handler that wants an unsigned number takes the one and refuses the other.
        assert!(serde_json::from_str::<u64>("0").is_ok());
        assert!(serde_json::from_str::<u64>("-0").is_err());
    }

    #[test]
    fn exponents_up_to_64_bits_are_exact_and_beyond_are_text() {
        assert_same(&["1e9223372036854775807", "1.0e9223372036854775807"]);
        assert_same(&["1e-9223372036854775808", "1e-0000009223372036854775808"]);
        assert_all_different(&[
            "1e9223372036854775807",
            "1e9223372036854775808",
            "10e9223372036854775807",
            "0.1e-9223372036854775808",
            "1e-9223372036854775808",
            "1e-9223372036854775809",
            "1e99999999999999999999",
            "1e99999999999999999998",
            "-1e99999999999999999999",
        ]);
        let long = format!("1e{}1", "0".repeat(100_000));
        assert_same(&["10", &long]);
        assert!(canonical(&format!("1e{}", "9".repeat(100_000))).is_some());
    }

    #[test]
    fn what_is_not_json_is_refused_and_feeds_nothing() {
        let refused = r#"{ [ ] [1 [1,] [,1] {"a"} {"a":} {"a":1,} {a:1} {1:1} {,} {"a"1} [} {] [1]] {}{} //
            01 -01 - +1 --1 1. .1 1e 1e+ 1e1.5 0x1 NaN Infinity nul nulll True
            " "a "\" "\x" "\é" "\u12" "\u+123" "\u12G4" "\ "\u "\ud800\ 'a'"#;
        let spaced = [
            "",
            " ",
            "1 2",
            "[1 2]",
            "\"\n\"",
            "\"\t\"",
            "\u{feff}1",
            "1\u{a0}",
            "// a\n1",
            "\u{b}1",
            "nu ll",
        ];
        for body in refused.split_whitespace().chain(spaced) {
            assert_eq!(canonical(body), None, "{body:?}");
            assert!(serde_json::from_str::<serde_json::Value>(body).is_err(), "{body:?}");
        }
    }

    #[test]
    fn half_a_surrogate_pair_and_invalid_utf8_are_refused() {
        for body in [
            r#""\ud800""#,
            r#""\udc00""#,
            r#""\ud800\ud800""#,
            r#""\ud800a""#,
            r#""\ud800\n""#,
            r#""\udc00\ud800""#,
        ] {
            assert_eq!(canonical(body), None, "{body}");
        }
        let settings = CanonicalJson::new();
        for body in [
            &b"\"\xff\""[..],
            b"\"\xc3\"",
            b"\"\xed\xa0\x80\"",
            b"\xff",
            b"1\xff",
            b"\"\xc0\xaf\"",
        ] {
            assert_eq!(fed(&settings, body), None, "{body:?}");
        }
    }

    #[test]
    fn nesting_is_bounded_at_128() {
        for (open, close) in [("[", "]"), ("{\"a\":", "}"), ("[{\"a\":", "}]")] {
            let levels = open.chars().filter(|char| "[{".contains(*char)).count();
            let nested = |times: usize| format!("{}1{}", open.repeat(times), close.repeat(times));
            assert!(canonical(&nested(MAX_DEPTH / levels)).is_some());
            assert_eq!(canonical(&nested(MAX_DEPTH / levels + 1)), None);
            assert_eq!(canonical(&nested(100_000)), None);
            assert_eq!(canonical(&open.repeat(100_000)), None);
        }
        let wide = format!("[{}[]]", "[[]],".repeat(1000));
        assert!(canonical(&wide).is_some(), "depth is not the number of arrays");
    }

    #[test]
    fn left_out_members_were_never_sent() {
        let cases: [(&[&str], &str, &str); 14] = [
            (&["/a"], r#"{"a":{"x":[1]},"b":2}"#, r#"{"b":2}"#),
            (&["/a"], r#"{"\u0061":1,"b":2,"a":3}"#, r#"{"b":2}"#),
            (&["/a"], r#"{"b":{"a":1}}"#, r#"{"b":{"a":1}}"#),
            (&["/b/a", "/c"], r#"{"b":{"a":1,"c":3},"c":2}"#, r#"{"b":{"c":3}}"#),
            (&["/b/a", "/b"], r#"{"b":{"a":1,"c":3},"c":2}"#, r#"{"c":2}"#),
            (
                &["/a~1b", "/m~0n", "/~01"],
                r#"{"a/b":1,"m~n":2,"~1":3,"/":4}"#,
                r#"{"/":4}"#,
            ),
            (&["/"], r#"{"":1," ":2}"#, r#"{" ":2}"#),
            (&["//"], r#"{"":{"":1,"a":2}}"#, r#"{"":{"a":2}}"#),
            (&["/0", "/2"], "[1,[2],{\"a\":3},4]", "[[2],4]"),
            (&["/1/0/a"], r#"[{"a":1},[{"a":1,"b":2}]]"#, r#"[{"a":1},[{"b":2}]]"#),
            (
                &["/00", "/-", "/+1", "/01", "/5", "/99999999999999999999"],
                "[1,2]",
                "[1,2]",
            ),
            (&["/0", "/01", "/-"], r#"{"0":0,"01":1,"-":2,"1":3}"#, r#"{"1":3}"#),
            (&["/a/b"], r#"{"a":"b","c":null}"#, r#"{"a":"b","c":null}"#),
            (&["/a"], "1", "1"),
        ];
        for (pointers, sent, counted) in cases {
            let form = fed(&leaving_out(pointers), sent.as_bytes());
            assert_eq!(form, canonical(counted), "{sent} without {pointers:?}");
        }
    }

    #[test]
    fn pointers_that_are_none_are_refused() {
        for pointer in ["", "a", "#/a", "/~", "/a~2", "/~a/b", "/a/~", &"/a".repeat(129)] {
            let error = CanonicalJson::new().leave_out(pointer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration, "{pointer}");
        }
        assert!(CanonicalJson::new().leave_out(&"/a".repeat(128)).is_ok());
    }

    #[test]
    fn long_documents_arrive_whole_whatever_the_chunks() {
        let body = format!(
            "[{},\"{}\",\"\\u0061{}\"]",
            "1,".repeat(9999) + "1",
            "x".repeat(3 * CHUNK),
            "é".repeat(CHUNK)
        );
        let expected = decode(&canonical(&body).unwrap());
        let Json::Array(elements) = expected else {
            panic!("an array was sent")
        };
        assert_eq!(elements.len(), 10_002);
        assert_eq!(elements[10_000], Json::String("x".repeat(3 * CHUNK)));
        assert_eq!(elements[10_001], Json::String(format!("a{}", "é".repeat(CHUNK))));
    }

    /// The model: what a document means, as far as fingerprints care.
    #[derive(Clone, Debug, PartialEq)]
    enum Json {
        Literal(u8),
        /// Sign, digits without zeros at either end, exponent; zero is without digits and exponent.
        Number(bool, String, i64),
        Text(String),
        String(String),
        Array(Vec<Json>),
        Object(Vec<(String, Json)>),
    }

    impl Json {
        /// Members sorted by name, those of one name in their order.
        fn sorted(&self) -> Self {
            match self {
                Self::Array(elements) => Self::Array(elements.iter().map(Self::sorted).collect()),
                Self::Object(members) => {
                    let mut by_name = BTreeMap::<_, Vec<_>>::new();
                    for (name, value) in members {
                        by_name.entry(name.clone()).or_default().push(value.sorted());
                    }
                    let groups = by_name.into_iter();
                    let members =
                        groups.flat_map(|(name, values)| values.into_iter().map(move |value| (name.clone(), value)));
                    Self::Object(members.collect())
                }
                scalar => scalar.clone(),
            }
        }
    }

    /// Reads the canonical form back. That this is possible is what makes the form injective.
    fn decode(bytes: &[u8]) -> Json {
        let mut rest = bytes;
        let value = decode_value(&mut rest);
        assert!(rest.is_empty());
        value
    }

    fn decode_value(rest: &mut &[u8]) -> Json {
        match take(rest) {
            b'#' => {
                let negative = take(rest) == b'-';
                let end = rest.iter().copied().find(|byte| !byte.is_ascii_digit()).unwrap();
                let digits = decode_until(rest, end);
                let exponent = if end == b';' {
                    [0; 8]
                } else {
                    [(); 8].map(|()| take(rest))
                };
                Json::Number(negative, digits, i64::from_be_bytes(exponent))
            }
            b'~' => Json::Text(decode_until(rest, END)),
            b'"' => Json::String(decode_until(rest, END)),
            b'[' => {
                let mut elements = Vec::new();
                while rest[0] != b']' {
                    elements.push(decode_value(rest));
                }
                take(rest);
                Json::Array(elements)
            }
            b'{' => {
                let mut members = Vec::new();
                while rest[0] != b'}' {
                    let Json::String(name) = decode_value(rest) else {
                        panic!("names are strings")
                    };
                    members.push((name, decode_value(rest)));
                }
                take(rest);
                Json::Object(members)
            }
            literal => Json::Literal(literal),
        }
    }

    fn take(rest: &mut &[u8]) -> u8 {
        let (&first, behind) = rest.split_first().unwrap();
        *rest = behind;
        first
    }

    fn decode_until(rest: &mut &[u8], end: u8) -> String {
        let length = rest.iter().position(|&byte| byte == end).unwrap();
        let text = String::from_utf8(rest[..length].to_vec()).unwrap();
        *rest = &rest[length + 1..];
        text
    }

    fn number() -> impl Strategy<Value = Json> {
        let exponent = prop_oneof![4 => -12_i64..12, 1 => -1000_i64..1000, 1 => -(1_i64 << 62)..1_i64 << 62];
        (any::<bool>(), "|[1-9]|[1-9][0-9]{0,30}[1-9]", exponent).prop_map(|(negative, digits, exponent)| {
            let exponent = if digits.is_empty() { 0 } else { exponent };
            Json::Number(negative, digits, exponent)
        })
    }

    fn string() -> impl Strategy<Value = String> {
        prop_oneof![
            select(vec!["a", "b", "c", "aa", "ab", "0", "1", "", "~", "/", "a/b"]).prop_map(str::to_owned),
            "[a-c\"\\\\/\u{8}\u{c}\n\r\t\u{0}\u{7f}é\u{d7ff}\u{e000}\u{ffff}😀\u{10ffff}]{0,6}",
            any::<String>(),
        ]
    }

    fn json() -> impl Strategy<Value = Json> {
        let scalar = prop_oneof![
            select(b"ntf".to_vec()).prop_map(Json::Literal),
            number(),
            string().prop_map(Json::String),
        ];
        scalar.prop_recursive(5, 60, 8, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Json::Array),
                proptest::collection::vec((string(), inner), 0..6).prop_map(Json::Object),
            ]
        })
    }

    /// Writes a document in one of its countless spellings.
    struct Spelling {
        state: u64,
    }

    impl Spelling {
        /// xorshift64: every bit of whim comes from the one seed that proptest prints.
        fn below(&mut self, bound: usize) -> usize {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            usize::try_from(self.state % u64::try_from(bound).unwrap()).unwrap()
        }

        fn spell(seed: u64, value: &Json) -> String {
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

        /// In any order but that of members of the same name among themselves.
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
            // Leading zeros are not allowed, so that zero itself starts from one digit and gets no trailing ones.
            let (digits, zeros) = if digits.is_empty() {
                ("0", 0)
            } else {
                (digits, self.below(4))
            };
            let mut digits = format!("{digits}{}", "0".repeat(zeros));
            let mut exponent = exponent - i64::try_from(zeros).unwrap();
            // The point moves to the left by this many places.
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

    /// A change somewhere in the document. Some change nothing (two equal elements swapped): the model decides.
    fn changed(value: &Json, at: &[Index], kind: usize) -> Json {
        let mut changed = value.clone();
        let mut place = &mut changed;
        let mut path = at.iter();
        loop {
            let inner = matches!(place, Json::Array(list) if !list.is_empty())
                || matches!(place, Json::Object(members) if !members.is_empty());
            match path.next().filter(|_| inner) {
                Some(step) => {
                    place = match place {
                        Json::Array(elements) => {
                            let at = step.index(elements.len());
                            &mut elements[at]
                        }
                        Json::Object(members) => {
                            let at = step.index(members.len());
                            &mut members[at].1
                        }
                        _ => unreachable!("only what holds values is entered"),
                    }
                }
                None => break,
            }
        }
        change(place, kind);
        changed
    }

    fn change(place: &mut Json, kind: usize) {
        match place {
            Json::Number(negative, _, _) if kind % 3 == 0 => *negative = !*negative,
            Json::Number(_, digits, exponent) if !digits.is_empty() && kind % 3 == 1 => *exponent += 1,
            Json::Number(_, digits, _) => digits.push('1'),
            Json::String(string) if kind % 2 == 0 => string.push('a'),
            Json::String(string) => drop(string.pop()),
            Json::Array(elements) if kind % 3 == 0 => elements.reverse(),
            Json::Array(elements) if kind % 3 == 1 => drop(elements.pop()),
            Json::Array(elements) => *elements = vec![Json::Array(std::mem::take(elements))],
            Json::Object(members) if kind % 4 == 0 => members.reverse(),
            Json::Object(members) if kind % 4 == 1 => members.extend(members.first().cloned()),
            Json::Object(members) if kind % 4 == 2 => drop(members.pop()),
            Json::Object(members) => members.iter_mut().for_each(|(name, _)| name.push('b')),
            Json::Literal(literal) => *literal = if *literal == b'n' { b't' } else { b'n' },
            Json::Text(_) => {}
        }
    }

    /// The document without what lies at the end of `path`, and the pointer to it; `None` at a scalar.
    fn without(value: &Json, path: &[Index]) -> Option<(Json, String)> {
        let (step, rest) = path.split_first()?;
        match value {
            Json::Array(elements) if !elements.is_empty() => {
                let at = step.index(elements.len());
                let mut elements = elements.clone();
                let (kept, below) =
                    without(&elements[at], rest).map_or((None, String::new()), |(kept, below)| (Some(kept), below));
                elements.splice(at..=at, kept);
                Some((Json::Array(elements), format!("/{at}{below}")))
            }
            Json::Object(members) if !members.is_empty() => {
                let name = &members[step.index(members.len())].0;
                let members = members.iter().filter(|member| member.0 != *name).cloned().collect();
                Some((
                    Json::Object(members),
                    format!("/{}", name.replace('~', "~0").replace('/', "~1")),
                ))
            }
            _ => None,
        }
    }

    /// `None` where `serde_json` cannot be asked: it gives up at numbers too large for f64 and never at lone surrogates
    /// when it skips them.
    fn accepted_by_serde_json(body: &[u8]) -> Option<bool> {
        match serde_json::from_slice::<serde_json::Value>(body) {
            Err(error) if error.to_string().starts_with("number out of range") => {
                let syntax = serde_json::from_slice::<IgnoredAny>(body).is_ok() && std::str::from_utf8(body).is_ok();
                (!syntax || !body.windows(2).any(|pair| pair == b"\\u")).then_some(syntax)
            }
            // The only documented difference: `Value` ends at 127 levels, we at 128.
            Err(error) if error.to_string().starts_with("recursion limit exceeded") => None,
            result => Some(result.is_ok()),
        }
    }

    fn mutated() -> impl Strategy<Value = Vec<u8>> {
        let telling = || prop_oneof![4 => select(br#"{}[]:,"\/ubnte+-.019Ee"#.to_vec()), 1 => any::<u8>()];
        let edits = proptest::collection::vec((any::<Index>(), 0..3_usize, telling()), 0..3);
        (json(), any::<u64>(), edits).prop_map(|(value, seed, edits)| {
            let mut body = Spelling::spell(seed, &value).into_bytes();
            for (at, kind, byte) in edits {
                let at = at.index(body.len() + 1);
                let end = (at + usize::from(kind > 0)).min(body.len());
                body.splice(at..end, (kind < 2).then_some(byte));
            }
            body
        })
    }

    #[test]
    fn mutated_documents_are_both_accepted_and_refused() {
        let mut runner = TestRunner::deterministic();
        let accepted = (0..1000).filter(|_| {
            let body = mutated().new_tree(&mut runner).unwrap().current();
            fed(&CanonicalJson::new(), &body).is_some()
        });
        let accepted = accepted.count();
        assert!((300..900).contains(&accepted), "{accepted} of 1000 accepted");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn two_spellings_of_a_document_have_one_form(value in json(), seeds in any::<(u64, u64)>()) {
            let (one, other) = (Spelling::spell(seeds.0, &value), Spelling::spell(seeds.1, &value));
            let form = canonical(&one);
            prop_assert!(form.is_some(), "{}", one);
            prop_assert_eq!(&form, &canonical(&other), "{} and {}", one, other);
            prop_assert_eq!(decode(&form.unwrap()), value.sorted());
        }

        #[test]
        fn two_documents_have_one_form_only_if_they_mean_the_same(
            value in json(),
            at in proptest::collection::vec(any::<Index>(), 0..5),
            kind in 0..12_usize,
            seed in any::<u64>(),
        ) {
            let other = changed(&value, &at, kind);
            let forms = [canonical(&Spelling::spell(seed, &value)), canonical(&Spelling::spell(!seed, &other))];
            prop_assert_eq!(forms[0] == forms[1], value.sorted() == other.sorted(), "{:?} and {:?}", value, other);
        }

        #[test]
        fn leaving_out_equals_never_having_sent(
            value in json(), path in proptest::collection::vec(any::<Index>(), 1..5), seed in any::<u64>(),
        ) {
            if let Some((kept, pointer)) = without(&value, &path) {
                let form = fed(&leaving_out(&[&pointer]), Spelling::spell(seed, &value).as_bytes());
                prop_assert_eq!(form, canonical(&Spelling::spell(!seed, &kept)), "{}", pointer);
            }
        }

        #[test]
        fn accepts_what_serde_json_accepts(body in mutated()) {
            if let Some(accepted) = accepted_by_serde_json(&body) {
                prop_assert_eq!(fed(&CanonicalJson::new(), &body).is_some(), accepted, "{}", body.escape_ascii());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(body in any::<Vec<u8>>(), soup in "[\\[\\]{}:,\"\\\\ud8c0-9eE+. -]{0,40}") {
            for body in [&body[..], soup.as_bytes()] {
                let fed = fed(&leaving_out(&["/0", "/a/0"]), body).is_some();
                if let Some(accepted) = accepted_by_serde_json(body) {
                    prop_assert_eq!(fed, accepted, "{}", body.escape_ascii());
                }
            }
        }
    }
}
