//! The JSON pointers to leave out, as a tree.

use super::quoted::Quoted;
use super::reader::MAX_DEPTH;
use crate::error::{Error, ErrorKind};

/// What the pointers say about one value; at most [`MAX_DEPTH`] levels.
#[derive(Clone, Debug, Default)]
pub(super) struct LeftOut {
    pub(super) whole: bool,
    below: Vec<Step>,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    /// The array index that `name` spells, if it spells one.
    index: Option<usize>,
    to: LeftOut,
}

/// Where no pointer leads.
static NOTHING: LeftOut = LeftOut {
    whole: false,
    below: Vec::new(),
};

impl LeftOut {
    pub(super) fn add(&mut self, pointer: &str) -> Result<(), Error> {
        let mut place = self;
        for name in steps(pointer)? {
            place = place.below(name);
        }
        place.whole = true;
        Ok(())
    }

    fn below(&mut self, name: String) -> &mut Self {
        let known = self.below.iter().position(|step| step.name == name);
        let at = known.unwrap_or_else(|| {
            self.below.push(Step::new(name));
            self.below.len() - 1
        });
        &mut self.below[at].to
    }

    pub(super) fn member(&self, name: Quoted<'_>) -> &Self {
        self.find(|step| name.is(&step.name))
    }

    pub(super) fn element(&self, index: usize) -> &Self {
        self.find(|step| step.index == Some(index))
    }

    fn find(&self, leads_there: impl Fn(&Step) -> bool) -> &Self {
        let step = self.below.iter().find(|step| leads_there(step));
        step.map_or(&NOTHING, |step| &step.to)
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

/// RFC 6901, section 3: `json-pointer = *( "/" reference-token )`.
fn steps(pointer: &str) -> Result<Vec<String>, Error> {
    let Some(steps) = pointer.strip_prefix('/') else {
        return Err(invalid(
            "a JSON pointer to leave out starts with a slash and names a member or element",
        ));
    };
    let steps = steps.split('/').map(unescaped).collect::<Option<Vec<_>>>();
    let steps = steps.ok_or_else(|| invalid("a tilde in a JSON pointer is written ~0, a slash ~1"))?;
    if steps.len() > MAX_DEPTH {
        return Err(invalid("a JSON pointer to leave out has at most 128 steps"));
    }
    Ok(steps)
}

/// RFC 6901, section 3: `escaped = "~" ( "0" / "1" )`.
fn unescaped(step: &str) -> Option<String> {
    let valid = step.split('~').skip(1).all(|behind| behind.starts_with(['0', '1']));
    // Section 4: "first transforming any occurrence of the sequence '~1' to '/', and then transforming any occurrence
    // of the sequence '~0' to '~'", so that `~01` becomes `~1`.
    valid.then(|| step.replace("~1", "/").replace("~0", "~"))
}

fn invalid(what: &'static str) -> Error {
    Error::new(ErrorKind::Configuration, what)
}
