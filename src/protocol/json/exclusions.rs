//! The JSON pointers to exclude, as a tree.

use super::reader::MAX_DEPTH;
use super::string::RawString;
use crate::error::Error;

/// The exclusions at and below one value. The tree has at most [`MAX_DEPTH`] levels.
#[derive(Clone, Debug, Default)]
pub(super) struct Exclusions {
    pub(super) whole: bool,
    below: Vec<Step>,
}

#[derive(Clone, Debug)]
struct Step {
    name: String,
    /// The array index, if `name` is one.
    index: Option<usize>,
    to: Exclusions,
}

/// The exclusions of a value that no pointer leads to.
static NOTHING: Exclusions = Exclusions {
    whole: false,
    below: Vec::new(),
};

impl Exclusions {
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

    pub(super) fn member(&self, name: RawString<'_>) -> &Self {
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
        // RFC 6901, section 4, defines an index as "%x30 / ( %x31-39 *(%x30-39) )". Therefore
        // neither "01" nor "+1" is one.
        let index = name.parse().ok().filter(|index: &usize| index.to_string() == name);
        Self {
            name,
            index,
            to: Exclusions::default(),
        }
    }
}

/// Splits a pointer into its steps. RFC 6901, section 3: `json-pointer = *( "/" reference-token )`.
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

/// Resolves the escapes of a step. RFC 6901, section 3: `escaped = "~" ( "0" / "1" )`.
fn unescaped(step: &str) -> Option<String> {
    let valid = step.split('~').skip(1).all(|behind| behind.starts_with(['0', '1']));
    // Section 4: "first transforming any occurrence of the sequence '~1' to '/', and then
    // transforming any occurrence of the sequence '~0' to '~'". Therefore `~01` becomes `~1`.
    valid.then(|| step.replace("~1", "/").replace("~0", "~"))
}

fn invalid(what: &'static str) -> Error {
    Error::configuration(what)
}
