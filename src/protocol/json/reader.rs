//! The first pass: checks the text and builds the index of members.

use super::cursor::Cursor;
use super::index::{Index, Member, narrow};

/// The maximum nesting of arrays and objects.
pub(super) const MAX_DEPTH: usize = 128;

/// Reads the whole text. Returns `None` if it is not JSON.
pub(super) fn read(text: &str) -> Option<Index<'_>> {
    // The index holds offsets of 32 bits.
    u32::try_from(text.len()).ok()?;
    let mut reader = Reader {
        cursor: Cursor::new(text),
        index: Index::new(text),
        open: Vec::new(),
        depth: 0,
    };
    reader.value()?;
    reader.cursor.token().is_none().then_some(reader.index)
}

/// The state of the first pass. Every method returns `None` at the first byte that is not JSON.
struct Reader<'a> {
    cursor: Cursor<'a>,
    index: Index<'a>,
    /// The members that were read of the objects that are still open.
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
        let object = self.index.open(start);
        let first = self.open.len();
        self.list(Self::member, b'}')?;
        self.close(object, first)
    }

    /// Reads one item or more, and the `end`.
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
        let text = self.index.text;
        // The sort is stable, because the order of members with the same name decides which of them
        // a parser uses.
        self.open
            .get_mut(first..)?
            .sort_by(|one, other| one.name(text).compare(other.name(text)));
        let end = narrow(self.cursor.at)?;
        self.index.close(object, end, self.open.drain(first..))
    }
}
