//! The second pass: goes through the text in canonical order and writes.

use super::cursor::{Cursor, Scalar};
use super::left_out::LeftOut;
use super::notes::{wide, Member, Notes};
use super::output::Output;

pub(super) fn write(notes: &Notes<'_>, left_out: &LeftOut, sink: &mut dyn FnMut(&[u8])) {
    let mut writer = Writer {
        cursor: Cursor::new(notes.text),
        notes,
        output: Output::new(sink),
    };
    let written = writer.value(left_out);
    debug_assert!(written.is_some(), "the second pass reads what the first has read");
    writer.output.flush();
}

struct Writer<'a, 's> {
    cursor: Cursor<'a>,
    notes: &'a Notes<'a>,
    output: Output<'s>,
}

impl Writer<'_, '_> {
    fn value(&mut self, left_out: &LeftOut) -> Option<()> {
        match self.cursor.token()? {
            b'[' => self.array(left_out),
            b'{' => self.object(left_out),
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

    fn array(&mut self, left_out: &LeftOut) -> Option<()> {
        self.cursor.expect(b'[')?;
        self.output.write(b"[");
        let mut index = 0;
        while !self.cursor.skip(b']') {
            self.element(left_out.element(index))?;
            self.cursor.skip(b',');
            index += 1;
        }
        self.output.write(b"]");
        Some(())
    }

    /// An element that is left out is read nevertheless: nothing is noted of where it ends.
    fn element(&mut self, left_out: &LeftOut) -> Option<()> {
        let mute = self.output.mute;
        self.output.mute |= left_out.whole;
        self.value(left_out)?;
        self.output.mute = mute;
        Some(())
    }

    fn object(&mut self, left_out: &LeftOut) -> Option<()> {
        let start = self.cursor.at;
        self.output.write(b"{");
        self.cursor.expect(b'{')?;
        if !self.cursor.skip(b'}') {
            let (members, end) = self.notes.object_at(start)?;
            for member in members {
                self.member(member, left_out)?;
            }
            self.cursor.at = end;
        }
        self.output.write(b"}");
        Some(())
    }

    fn member(&mut self, member: &Member, left_out: &LeftOut) -> Option<()> {
        let name = member.name(self.notes.text);
        let left_out = left_out.member(name);
        if !left_out.whole {
            self.output.string(name);
            self.cursor.at = wide(member.value);
            self.value(left_out)?;
        }
        Some(())
    }
}
