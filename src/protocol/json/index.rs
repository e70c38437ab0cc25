//! The index that the first pass builds for the second.

use super::string::RawString;

/// The text, and the positions of the members of each object that has any.
pub(super) struct Index<'a> {
    pub(super) text: &'a str,
    /// The objects in the order of their opening braces.
    objects: Vec<Object>,
    /// The members of all objects. Those of one object are adjacent and sorted by name. Members of
    /// the same name stay in the order in which they were sent.
    members: Vec<Member>,
}

/// Offsets have 32 bits here and below. This halves the memory that a hostile body can claim.
struct Object {
    start: u32,
    end: u32,
    first_member: u32,
    members_end: u32,
}

pub(super) struct Member {
    /// The start and the end of the name, between the quotes.
    pub(super) name: (u32, u32),
    pub(super) name_is_escaped: bool,
    pub(super) value: u32,
}

impl<'a> Index<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            objects: Vec::new(),
            members: Vec::new(),
        }
    }

    /// Adds an object at its opening brace. Returns its number, which [`close`](Self::close) needs.
    pub(super) fn open(&mut self, start: u32) -> usize {
        self.objects.push(Object {
            start,
            end: start,
            first_member: 0,
            members_end: 0,
        });
        self.objects.len() - 1
    }

    /// Completes the entry of an object with its end and its sorted members.
    pub(super) fn close(&mut self, object: usize, end: u32, members: impl Iterator<Item = Member>) -> Option<()> {
        let object = self.objects.get_mut(object)?;
        object.end = end;
        object.first_member = narrow(self.members.len())?;
        self.members.extend(members);
        object.members_end = narrow(self.members.len())?;
        Some(())
    }

    /// Returns the sorted members and the end of the object that starts at `start`.
    pub(super) fn object_at(&self, start: usize) -> Option<(&[Member], usize)> {
        let found = self.objects.binary_search_by_key(&start, |object| wide(object.start));
        let object = self.objects.get(found.ok()?)?;
        let members = wide(object.first_member)..wide(object.members_end);
        Some((self.members.get(members)?, wide(object.end)))
    }
}

impl Member {
    pub(super) fn name<'a>(&self, text: &'a str) -> RawString<'a> {
        let (start, end) = self.name;
        RawString {
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
