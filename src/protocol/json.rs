//! Canonical JSON for fingerprints: the same document, however it was written, gives the same bytes; any other
//! document gives other bytes.
//!
//! Two passes over the text, neither of which builds a tree. The first checks all of it against RFC 8259 and notes where
//! the members of each object are, sorted by name; the second follows these notes and writes the canonical form. Both
//! read with the same [`Cursor`], which trusts nothing, so the second pass cannot stumble where the first did not.
//! Time is that of the sorting, memory a few words per object member, recursion ends at [`MAX_DEPTH`].
//!
//! The canonical form is prefix-free and can be decoded (the tests do), hence injective:
//!
//! | value | bytes |
//! |---|---|
//! | `null`, `true`, `false` | `n`, `t`, `f` |
//! | string | `"`, the UTF-8 of its characters, `FF` (which UTF-8 never contains) |
//! | number | `#`, sign, significant digits without zeros at either end, `e`, exponent of ten as big-endian `i64` |
//! | number whose exponent fits no `i64` | `~`, the text as sent, `FF` |
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
/// doubt two bodies are different, since a wrong "different" refuses a retry while a wrong "same" answers a request that
/// was never made:
///
/// * `-0` is not `0`. The two are equal numbers, but many parsers tell them apart, by sign or even by type.
/// * A member that occurs twice counts twice, in the order sent: parsers disagree on which of them wins.
/// * Exponents that do not fit 64 bits are compared as text.
/// * Strings are compared character by character, without Unicode normalization.
///
/// A body that is not JSON (RFC 8259), holds half a surrogate pair, nests arrays and objects deeper than 128 levels or is
/// longer than 4 GiB is fingerprinted by its bytes.
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
    /// For members that change with every retry, such as a time of sending: `/sent_at`, `/meta/trace`, `/items/0/nonce`.
    /// Of a member that occurs twice every occurrence is left out. Indexes count the elements as they were sent, however
    /// many of them are left out; `-` names no element. A pointer that names nothing in a body changes nothing.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Configuration`] when `pointer` is no JSON pointer, when it is empty and so names the whole body, or
    /// when it is longer than the 128 steps that bodies may be deep.
    pub fn leave_out(mut self, pointer: &str) -> Result<Self, Error> {
        let Some(steps) = pointer.strip_prefix('/') else {
            return Err(invalid_pointer("a JSON pointer to leave out starts with a slash and names a member or element"));
        };
        let steps = steps.split('/').map(unescaped_step).collect::<Option<Vec<_>>>();
        let steps = steps.ok_or_else(|| invalid_pointer("a tilde in a JSON pointer is written ~0, a slash ~1"))?;
        if steps.len() > MAX_DEPTH {
            return Err(invalid_pointer("a JSON pointer to leave out has at most 128 steps"));
        }
        self.left_out.add(steps);
        Ok(self)
    }

    /// Feeds the canonical form of `body` to `sink` and returns true; returns false, having fed nothing, when `body` has
    /// none, so that the caller falls back to the bytes.
    ///
    /// The form is meant to be hashed behind an algorithm id of its own: some other body may consist of these very bytes.
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
        self.below.iter().find(|step| step.index == Some(index)).map(|step| &step.to)
    }
}

impl Step {
    fn new(name: String) -> Self {
        // RFC 6901, section 4: an index is written "%x30 / ( %x31-39 *(%x30-39) )", so neither "01" nor "+1" is one.
        let index = name.parse().ok().filter(|index: &usize| index.to_string() == name);
        Self { name, index, to: LeftOut::default() }
    }
}

/// What the first pass has noted: the text, and for each object that has members where they are.
struct Notes<'a> {
    text: &'a str,
    /// In the order of their opening braces.
    objects: Vec<Object>,
    /// Those of one object lie together, sorted by name; members of the same name keep the order in which they were sent.
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
            notes: Self { text, objects: Vec::new(), members: Vec::new() },
            open: Vec::new(),
            depth: 0,
        };
        reader.value()?;
        reader.cursor.token().is_none().then_some(reader.notes)
    }

    fn object_at(&self, start: usize) -> Option<Object> {
        let found = self.objects.binary_search_by_key(&start, |object| wide(object.start)).ok()?;
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
        Quoted { content: text.get(wide(start)..wide(end)).unwrap_or_default(), escaped: self.name_is_escaped }
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
        self.notes.objects.push(Object { start, end: start, first_member: 0, members_end: 0 });
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
        self.open.push(Member { name, name_is_escaped, value: narrow(self.cursor.at)? });
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
        Self { cursor: Cursor { text: notes.text, at: 0 }, notes, output: Output { buffer: Vec::new(), sink, mute: false } }
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
        self.write(b"e");
        self.write(&decimal.exponent.to_be_bytes());
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
        // RFC 8259, section 2: "Insignificant whitespace is allowed before or after any of the six structural characters."
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
        let fraction = if self.take(|byte| byte == b'.') { self.digits()? } else { "" };
        let exponent = if self.take(|byte| matches!(byte, b'e' | b'E')) { self.exponent()? } else { "0" };
        Some(Number { text: self.text.get(start..self.at)?, negative, integer, fraction, exponent })
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

/// RFC 8259, section 7: a character outside the Basic Multilingual Plane is "a 12-character sequence, encoding the UTF-16
/// surrogate pair". Half a pair is no character, hence no string here; section 8.2 calls such texts unpredictable.
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

/// The number `digits` times ten to the power of `exponent`; the digits, concatenated, neither start nor end with a zero,
/// so that every value has exactly one such form. Zero has no digits.
struct Decimal<'a> {
    digits: [&'a str; 2],
    exponent: i64,
}

impl<'a> Number<'a> {
    /// `None` when the exponent does not fit.
    fn decimal(&self) -> Option<Decimal<'a>> {
        let fraction = self.fraction.trim_end_matches('0');
        // Zeros before the point only carry no information when nothing stands behind it.
        let integer = if fraction.is_empty() { self.integer.trim_end_matches('0') } else { self.integer };
        if integer.is_empty() && fraction.is_empty() {
            return Some(Decimal { digits: ["", ""], exponent: 0 });
        }
        let raised = i64::try_from(self.integer.len() - integer.len()).ok()?;
        let lowered = i64::try_from(fraction.len()).ok()?;
        let exponent: i64 = self.exponent.parse().ok()?;
        // At most one of the two is not zero, so that no intermediate result overflows where the last would fit.
        let exponent = exponent.checked_add(raised)?.checked_sub(lowered)?;
        // "Leading zeros are not allowed": before the point there is a single one or none.
        let digits = if integer == "0" { ["", fraction.trim_start_matches('0')] } else { [integer, fraction] };
        Some(Decimal { digits, exponent })
    }
}
