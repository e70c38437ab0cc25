//! The plan of a job: its steps in two deployments, and its runs.

use std::fmt;

use crate::random::Random;

const NAMES: [&str; 6] = ["draft", "fill", "reserve", "charge", "confirm", "thank"];

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: &'static str,
    /// `None` inherits the input of the steps around this one.
    pub(super) input: Option<u8>,
    pub(super) work: Work,
}

impl Node {
    /// Half of the names stand for steps whose third party deduplicates.
    pub(super) fn at_least_once(&self) -> bool {
        self.name.len() % 2 == 0
    }
}

#[derive(Clone, Debug)]
pub(super) enum Work {
    Call {
        /// Whether the value is a text and not a number.
        is_text: bool,
    },
    Steps(Vec<Node>),
    /// The job names the step and does not run it.
    Skipped,
}

/// The end of the call of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Succeed,
    /// Fails without an effect.
    NotDone,
    /// Takes effect, and its result is lost.
    Lose,
}

#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) deployment: usize,
    /// The number of polls before the process crashes.
    pub(super) crash: Option<usize>,
    /// The ends of the calls, one after the other and then again from the first one.
    pub(super) acts: Vec<Act>,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    deployments: [Vec<Node>; 2],
    pub(super) runs: Vec<Run>,
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let random = &mut Random::new(seed, 2);
        let before = nodes(random, 2);
        let mut after = before.clone();
        for _ in 0..random.pick(&[0, 1, 1, 2]) {
            change(random, &mut after);
        }
        let runs = (0..=random.below(5)).map(|at| run(random, at)).collect();
        Self {
            deployments: [before, after],
            runs,
        }
    }

    pub(super) fn nodes(&self, run: &Run) -> &[Node] {
        &self.deployments[run.deployment]
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, nodes) in self.deployments.iter().enumerate() {
            writeln!(f, "  deployment {at}: {nodes:?}")?;
        }
        self.runs.iter().try_for_each(|run| writeln!(f, "  {run:?}"))
    }
}

fn nodes(random: &mut Random, depth: usize) -> Vec<Node> {
    (0..=random.below(4)).map(|_| node(random, depth)).collect()
}

fn node(random: &mut Random, depth: usize) -> Node {
    let is_group = depth > 0 && random.chance(25);
    Node {
        name: random.pick(&NAMES),
        input: random.chance(30).then(|| random.pick(&[1, 2])),
        work: if is_group {
            Work::Steps(nodes(random, depth - 1))
        } else if random.chance(10) {
            Work::Skipped
        } else {
            Work::Call {
                is_text: random.chance(30),
            }
        },
    }
}

/// Changes one step of a job, or the list of its steps.
fn change(random: &mut Random, nodes: &mut Vec<Node>) {
    let at = random.below(nodes.len());
    if let (Work::Steps(inner), true) = (&mut nodes[at].work, random.chance(60)) {
        return change(random, inner);
    }
    match random.below(8) {
        0 => nodes[at].name = random.pick(&NAMES),
        1 => nodes.insert(at, node(random, 0)),
        2 if nodes.len() > 1 => drop(nodes.remove(at)),
        3 => random.shuffle(nodes),
        4 => nodes[at].input = random.pick(&[None, Some(1), Some(2)]),
        5 => nodes.push(node(random, 1)),
        6 => nodes[at].work = Work::Skipped,
        _ => {
            if let Work::Call { is_text } = &mut nodes[at].work {
                *is_text = !*is_text;
            }
        }
    }
}

fn run(random: &mut Random, at: usize) -> Run {
    let acts = [
        Act::Succeed,
        Act::Succeed,
        Act::Succeed,
        Act::Succeed,
        Act::NotDone,
        Act::Lose,
    ];
    Run {
        // The second deployment follows the first one, and may be taken back.
        deployment: if at == 0 { 0 } else { random.below(2) },
        crash: random.chance(60).then(|| random.below(60)),
        acts: (0..=random.below(6)).map(|_| random.pick(&acts)).collect(),
    }
}
