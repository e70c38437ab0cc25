//! Makes documents that differ from a given one.

use proptest::sample::Index;

use super::model::Json;

/// Changes a value somewhere in the document. Some changes have no effect, for example if two equal
/// elements are swapped. The test compares the models to find out.
pub(super) fn changed(value: &Json, at: &[Index], kind: usize) -> Json {
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

/// Returns the document without the value at the end of `path`, and the pointer to that value.
/// Returns `None` at a scalar.
pub(super) fn without(value: &Json, path: &[Index]) -> Option<(Json, String)> {
    let (step, rest) = path.split_first()?;
    match value {
        Json::Array(elements) if !elements.is_empty() => {
            let at = step.index(elements.len());
            let mut elements = elements.clone();
            let (reduced, below) =
                without(&elements[at], rest).map_or((None, String::new()), |(reduced, below)| (Some(reduced), below));
            elements.splice(at..=at, reduced);
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
