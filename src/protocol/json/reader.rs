//! The first pass: checks the text and notes where the members are.

use super::cursor::Cursor;
use super::notes::{narrow, Member, Notes};

/// How many arrays and objects may lie in one another.
pub(super) const MAX_DEPTH: usize = 128;

/// `None` when `text` is no JSON.
pub(super) fn read(text: &str) -> Option<Notes<'_>> {
    // Offsets are noted in 32 bits.
    u32::try_from(text.len()).ok()?;
    let mut reader = Reader {
        cursor: Cursor::new(text),
        notes: Notes::new(text),
        open: Vec::new(),
        depth: 0,
    };
    reader.value()?;
    reader.cursor.token().is_none().then_some(reader.notes)
}

/// Every method returns `None` at the first byte that is not JSON.
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
        self.list(Self::value, b']')
    }

    fn object(&mut self) -> Option<()> {
        let start = narrow(self.cursor.at)?;
        self.cursor.expect(b'{')?;
        if self.cursor.skip(b'}') {
            return Some(());
        }
        let object = self.notes.open(start);
        let first = self.open.len();
        self.list(Self::member, b'}')?;
        self.close(object, first)
    }

    /// One item or more, and the `end`.
    fn list(&mut self, item: fn(&mut Self) -> Option<()>, end: u8) -> Option<()> {
        loop {
            item(self)?;
            if self.cursor.skip(end) {
                return Some(());
            }
            self.cursor.expect(b',')?;
        }
    }

    fn member(&mut self) -> Option<()> {
        self.cursor.token()?;
        let before = self.cursor.at;
        let name_is_escaped = self.cursor.string()?.escaped;
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
        // A stable sort: of the members of one name the order stays, as it decides which of them a parser takes.
        self.open
            .get_mut(first..)?
            .sort_by(|one, other| one.name(text).compare(other.name(text)));
        let end = narrow(self.cursor.at)?;
        self.notes.close(object, end, self.open.drain(first..))
    }
}
