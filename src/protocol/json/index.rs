//! What the first pass hands to the second.

use super::quoted::Quoted;

/// The text, and for each object that has members where they are.
pub(super) struct Notes<'a> {
    pub(super) text: &'a str,
    /// In the order of their opening braces.
    objects: Vec<Object>,
    /// Those of one object lie together, sorted by name; members of the same name keep the order in which they were
    /// sent.
    members: Vec<Member>,
}

/// Offsets are of 32 bits, as are those below, to halve the memory that a hostile body can ask for.
struct Object {
    start: u32,
    end: u32,
    first_member: u32,
    members_end: u32,
}

pub(super) struct Member {
    /// Between the quotes.
    pub(super) name: (u32, u32),
    pub(super) name_is_escaped: bool,
    pub(super) value: u32,
}

impl<'a> Notes<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            objects: Vec::new(),
            members: Vec::new(),
        }
    }

    /// Notes an object at its opening brace; returns its number, to close it by.
    pub(super) fn open(&mut self, start: u32) -> usize {
        self.objects.push(Object {
            start,
            end: start,
            first_member: 0,
            members_end: 0,
        });
        self.objects.len() - 1
    }

    /// Completes what is noted of an object with its end and its sorted members.
    pub(super) fn close(&mut self, object: usize, end: u32, members: impl Iterator<Item = Member>) -> Option<()> {
        let object = self.objects.get_mut(object)?;
        object.end = end;
        object.first_member = narrow(self.members.len())?;
        self.members.extend(members);
        object.members_end = narrow(self.members.len())?;
        Some(())
    }

    /// The sorted members of the object that starts there, and where it ends.
    pub(super) fn object_at(&self, start: usize) -> Option<(&[Member], usize)> {
        let found = self.objects.binary_search_by_key(&start, |object| wide(object.start));
        let object = self.objects.get(found.ok()?)?;
        let members = wide(object.first_member)..wide(object.members_end);
        Some((self.members.get(members)?, wide(object.end)))
    }
}

impl Member {
    pub(super) fn name<'a>(&self, text: &'a str) -> Quoted<'a> {
        let (start, end) = self.name;
        Quoted {
            content: text.get(wide(start)..wide(end)).unwrap_or_default(),
            escaped: self.name_is_escaped,
        }
    }
}

pub(super) fn narrow(offset: usize) -> Option<u32> {
    u32::try_from(offset).ok()
}

pub(super) fn wide(offset: u32) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
