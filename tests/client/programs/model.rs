//! The model of a job: the record of each step. After a crash, a step may have one of several
//! records, until a later run shows which of them it has.

use std::collections::HashMap;

use super::plan::{Act, Node, Plan, Work};
use super::{Entry, Got, Place};

/// The parts of a job that the record of a step covers: the names of the steps up to this one, for
/// each job around it, and the input.
type Print = (Vec<Vec<&'static str>>, Option<u8>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Record {
    Free,
    /// An attempt was lost.
    Lost(Print),
    Stored(Print, Stored),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stored {
    value: u64,
    is_text: bool,
}

/// A step that calls the third party, or the job itself.
#[derive(Default)]
struct Step {
    place: Place,
    print: Print,
    at_least_once: bool,
    is_text: bool,
}

/// Returns the steps of a job in the order in which they run. A step begins with the settings of
/// the step `around` it.
fn steps(nodes: &[Node], around: &Step) -> Vec<Step> {
    let mut all = Vec::new();
    for (position, node) in nodes.iter().enumerate() {
        let own = nodes[..=position].iter().map(|node| node.name).collect();
        let (names, input) = &around.print;
        let mut step = Step {
            place: [&around.place[..], &[position]].concat(),
            print: ([&names[..], &[own]].concat(), node.input.or(*input)),
            at_least_once: node.at_least_once() || around.at_least_once,
            is_text: false,
        };
        match &node.work {
            Work::Skipped => {}
            Work::Steps(inner) => all.extend(steps(inner, &step)),
            Work::Call { is_text } => {
                step.is_text = *is_text;
                all.push(step);
            }
        }
    }
    all
}

/// The entries of one step in one run.
#[derive(Default)]
struct Seen<'a> {
    began: Option<&'a str>,
    effect: Option<Act>,
    got: Option<(&'a Place, Got)>,
    /// The value that the third party gave.
    value: u64,
}

/// Reads the entries of one step. `at` moves to the next one.
fn read<'a>(entries: &'a [Entry], at: &mut usize) -> Seen<'a> {
    let mut seen = Seen::default();
    while let Some(entry) = entries.get(*at) {
        match entry {
            Entry::Run(_) => break,
            Entry::Began { id } => seen.began = Some(id),
            Entry::Effect(act) => {
                seen.effect = Some(*act);
                seen.value = u64::try_from(*at + 1).unwrap();
            }
            Entry::Got(place, got) => seen.got = Some((place, *got)),
        }
        *at += 1;
        if seen.got.is_some() {
            break;
        }
    }
    seen
}

pub(super) fn check(plan: &Plan, entries: &[Entry]) -> Result<(), String> {
    let mut records: HashMap<Place, Vec<Record>> = HashMap::new();
    let mut ids: HashMap<(Place, Print), &str> = HashMap::new();
    let mut effects: HashMap<Place, usize> = HashMap::new();
    let mut at = 0;
    for (number, run) in plan.runs.iter().enumerate() {
        if !matches!(entries.get(at), Some(Entry::Run(found)) if *found == number) {
            return Err(format!(
                "entry {at}: expected run {number}, found {:?}",
                entries.get(at)
            ));
        }
        at += 1;
        for step in steps(plan.nodes(run), &Step::default()) {
            let is_over = matches!(entries.get(at), None | Some(Entry::Run(_)));
            if is_over && run.crash.is_none() {
                return Err(format!("run {number}: {:?} did not run", step.place));
            }
            let seen = read(entries, &mut at);
            let possible = records.entry(step.place.clone()).or_insert_with(|| vec![Record::Free]);
            let mut next: Vec<Record> = possible.iter().flat_map(|record| after(&step, record, &seen)).collect();
            if next.is_empty() || seen.got.is_some_and(|(place, _)| *place != step.place) {
                return Err(format!(
                    "run {number}: step {:?} cannot end so with {possible:?}, {:?}",
                    step.place, seen.got
                ));
            }
            next.dedup();
            *possible = next;
            if let Some(id) = seen.began {
                let name = (step.place.clone(), step.print.clone());
                if *ids.entry(name).or_insert(id) != id || ids.values().filter(|other| **other == id).count() > 1 {
                    return Err(format!("run {number}: the id of step {:?} is not its own", step.place));
                }
            }
            if matches!(seen.effect, Some(Act::Succeed | Act::Lose)) && !step.at_least_once {
                *effects.entry(step.place.clone()).or_default() += 1;
            }
            if !matches!(seen.got, Some((_, Got::Done { .. } | Got::Failed))) {
                break;
            }
        }
    }
    if let Some(entry) = entries.get(at) {
        return Err(format!("entry {at} is unexpected: {entry:?}"));
    }
    match effects.iter().find(|(_, effects)| **effects > 1) {
        Some((place, effects)) => Err(format!("step {place:?} has {effects} effects")),
        None => Ok(()),
    }
}

/// Returns the records that a step can have after these entries, if it had this record before. None
/// if the step cannot have had this record.
fn after(step: &Step, record: &Record, seen: &Seen<'_>) -> Vec<Record> {
    let position = step.place[step.place.len() - 1];
    let refused = match record {
        Record::Free => None,
        Record::Lost(print) | Record::Stored(print, _) if *print != step.print => Some(Got::StepChanged { position }),
        Record::Lost(_) if step.at_least_once => None,
        Record::Lost(_) => Some(Got::Unknown),
        Record::Stored(_, stored) if stored.is_text != step.is_text => Some(Got::Unreadable),
        Record::Stored(_, stored) => Some(Got::Done {
            value: stored.value,
            is_replay: true,
        }),
    };
    let Some(refused) = refused else {
        return after_run(step, record, seen);
    };
    match seen.got {
        None if seen.began.is_none() => vec![record.clone()],
        Some((_, got)) if seen.began.is_none() && got == refused => vec![record.clone()],
        _ => Vec::new(),
    }
}

/// Returns the same for a step whose call may be made.
fn after_run(step: &Step, record: &Record, seen: &Seen<'_>) -> Vec<Record> {
    let lost = Record::Lost(step.print.clone());
    let released = if *record == Record::Free {
        Record::Free
    } else {
        lost.clone()
    };
    let stored = Record::Stored(
        step.print.clone(),
        Stored {
            value: seen.value,
            is_text: step.is_text,
        },
    );
    let ended = match seen.effect {
        None => lost.clone(),
        Some(Act::Succeed) => stored,
        Some(Act::NotDone) => released,
        Some(Act::Lose) => lost.clone(),
    };
    match (seen.got.map(|(_, got)| got), seen.effect) {
        (None, None) if seen.began.is_none() => vec![record.clone(), lost],
        // The process crashed, perhaps after the store had recorded the end.
        (None, _) => vec![lost, ended],
        (
            Some(Got::Done {
                value,
                is_replay: false,
            }),
            Some(Act::Succeed),
        ) if value == seen.value => vec![ended],
        (Some(Got::Failed), Some(Act::NotDone)) if *record == Record::Free => vec![ended],
        (Some(Got::Unknown), Some(Act::NotDone)) if *record != Record::Free => vec![ended],
        (Some(Got::Unknown), Some(Act::Lose)) => vec![ended],
        _ => Vec::new(),
    }
}
