//! The second pass: reads the text in canonical order and writes its form.

use super::cursor::{Cursor, Scalar};
use super::exclusions::Exclusions;
use super::index::{Index, Member, wide};
use super::output::Output;

pub(super) fn write(index: &Index<'_>, exclusions: &Exclusions, sink: &mut dyn FnMut(&[u8])) {
    let mut writer = Writer {
        cursor: Cursor::new(index.text),
        index,
        output: Output::new(sink),
    };
    let written = writer.value(exclusions);
    debug_assert!(written.is_some(), "the second pass reads what the first has read");
    writer.output.flush();
}

struct Writer<'a, 's> {
    cursor: Cursor<'a>,
    index: &'a Index<'a>,
    output: Output<'s>,
}

impl Writer<'_, '_> {
    fn value(&mut self, exclusions: &Exclusions) -> Option<()> {
        match self.cursor.token()? {
            b'[' => self.array(exclusions),
            b'{' => self.object(exclusions),
            _ => self.scalar(),
        }
    }

    fn scalar(&mut self) -> Option<()> {
        match self.cursor.scalar()? {
            Scalar::Literal(tag) => self.output.write(&[tag]),
            Scalar::Number(number) => self.output.number(&number),
            Scalar::String(string) => self.output.string(string),
        }
        Some(())
    }

    fn array(&mut self, exclusions: &Exclusions) -> Option<()> {
        self.cursor.expect(b'[')?;
        self.output.write(b"[");
        let mut index = 0;
        while !self.cursor.skip(b']') {
            self.element(exclusions.element(index))?;
            self.cursor.skip(b',');
            index += 1;
        }
        self.output.write(b"]");
        Some(())
    }

    /// Writes an element of an array. An excluded element is read as well, because the index does
    /// not contain its end.
    fn element(&mut self, exclusions: &Exclusions) -> Option<()> {
        let mute = self.output.mute;
        self.output.mute |= exclusions.whole;
        self.value(exclusions)?;
        self.output.mute = mute;
        Some(())
    }

    fn object(&mut self, exclusions: &Exclusions) -> Option<()> {
        let start = self.cursor.at;
        self.output.write(b"{");
        self.cursor.expect(b'{')?;
        if !self.cursor.skip(b'}') {
            let (members, end) = self.index.object_at(start)?;
            for member in members {
                self.member(member, exclusions)?;
            }
            self.cursor.at = end;
        }
        self.output.write(b"}");
        Some(())
    }

    fn member(&mut self, member: &Member, exclusions: &Exclusions) -> Option<()> {
        let name = member.name(self.index.text);
        let exclusions = exclusions.member(name);
        if !exclusions.whole {
            self.output.string(name);
            self.cursor.at = wide(member.value);
            self.value(exclusions)?;
        }
        Some(())
    }
}
