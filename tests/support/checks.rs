//! The guarantees, as checks over the history of one key. They know nothing of the machine that
//! recorded the history.

use std::collections::BTreeMap;

/// One run of a handler.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) attempt: u32,
    pub(crate) fence: u64,
    /// Whether the handler failed and knows that it had no effect.
    pub(crate) had_no_effect: bool,
}

/// A response that a client got.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) status: u16,
    /// The code of a refusal; empty for a response of the handler.
    pub(crate) code: String,
    pub(crate) body: String,
    /// Whether the client had sent another body under the key, by mistake.
    pub(crate) is_other_body: bool,
}

impl Seen {
    /// Whether a client sends no further request after this response.
    pub(crate) fn is_final(&self) -> bool {
        let refused = matches!(self.code.as_str(), "outcome-unknown" | "response-not-stored");
        self.is_made() || self.status == 422 || self.status == 409 && refused
    }

    /// Whether this is a response of the handler after its effect.
    fn is_made(&self) -> bool {
        self.status == 201
    }

    /// Returns the number of the effect that the response names.
    fn receipt(&self) -> Option<u64> {
        let (_, rest) = self.body.split_once("receipt ")?;
        rest.split_whitespace().next()?.parse().ok()
    }
}

/// The state of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Evidence {
    Absent,
    /// In flight, lost or unknown.
    Open,
    Completed,
}

/// The history of one key within one retention.
#[derive(Clone, Debug)]
pub(crate) struct KeyHistory {
    /// Whether an attempt that was lost runs again (`OnLost::Execute` and `Recover`).
    pub(crate) runs_again: bool,
    /// For each request, whether it had the other body.
    pub(crate) sent: Vec<bool>,
    /// The runs, in any order.
    pub(crate) runs: Vec<Run>,
    /// The numbers of the effects.
    pub(crate) effects: Vec<u64>,
    /// The responses. The last one came after all faults had ended.
    pub(crate) seen: Vec<Seen>,
    /// The record at the end.
    pub(crate) evidence: Evidence,
}

impl KeyHistory {
    /// Whether all requests had the same body.
    pub(crate) fn has_one_body(&self) -> bool {
        self.sent.iter().all(|is_other| *is_other == self.sent[0])
    }

    /// Returns the violations of guarantees. Each begins with the name of an invariant.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut violations = Vec::new();
        self.check_runs(&mut violations);
        self.check_effects(&mut violations);
        self.check_responses(&mut violations);
        self.check_evidence(&mut violations);
        self.check_end(&mut violations);
        violations
    }

    /// Each grant allows one run. Among the grants of one record, the fence grows with the attempt.
    /// A released record is gone, so attempts may begin at 1 again.
    fn check_runs(&self, violations: &mut Vec<String>) {
        let mut runs = self.runs.clone();
        runs.sort_by_key(|run| run.fence);
        for pair in runs.windows(2) {
            let (earlier, later) = (pair[0], pair[1]);
            if earlier.fence == later.fence {
                violations.push(format!("I1: the handler ran twice with the fence {}", later.fence));
            } else if later.attempt > 1 && later.attempt <= earlier.attempt {
                violations.push(format!("I9: {later:?} has a higher fence than {earlier:?}"));
            }
        }
        let failed = runs.iter().filter(|run| run.had_no_effect).count();
        if !self.runs_again && runs.len() > 1 + failed {
            violations.push(format!(
                "I1: the handler ran {} times, and {failed} runs failed without an effect",
                runs.len()
            ));
        }
    }

    fn check_effects(&self, violations: &mut Vec<String>) {
        if self.effects.len() > 1 {
            violations.push(format!("I3: there are several effects: {:?}", self.effects));
        }
        for seen in self.seen.iter().filter(|seen| seen.is_made()) {
            if !seen.receipt().is_some_and(|receipt| self.effects.contains(&receipt)) {
                violations.push(format!("I3: a response names no effect of its key: {:?}", seen.body));
                return;
            }
        }
    }

    fn check_responses(&self, violations: &mut Vec<String>) {
        let made: Vec<_> = self.seen.iter().filter(|seen| seen.is_made()).collect();
        if let Some(other) = made.iter().find(|seen| seen.body != made[0].body) {
            violations.push(format!(
                "I2: there are several responses: {:?} and {:?}",
                made[0].body, other.body
            ));
        }
        if made.iter().any(|seen| seen.is_other_body != made[0].is_other_body) {
            violations.push("I4: two different requests got one response".to_owned());
        }
        let is_mismatch = self.seen.iter().any(|seen| seen.status == 422);
        if is_mismatch && self.has_one_body() {
            violations.push("I4: all requests were equal, and a mismatch was reported".to_owned());
        }
    }

    /// Checks the record at the end (I5, I6). If the store fails when a run ends, the caller still
    /// gets the response. Without a further run, the record then stays in flight.
    fn check_evidence(&self, violations: &mut Vec<String>) {
        if !self.effects.is_empty() && self.evidence == Evidence::Absent {
            violations.push("I6: there is an effect and no record".to_owned());
        }
        let is_seen = self.seen.iter().any(Seen::is_made);
        if is_seen && self.runs_again && self.evidence != Evidence::Completed {
            violations.push(format!(
                "I5: a response was seen, and the record is {:?}",
                self.evidence
            ));
        }
    }

    fn check_end(&self, violations: &mut Vec<String>) {
        let Some(last) = self.seen.last() else {
            violations.push("I7: no request has a response".to_owned());
            return;
        };
        let may_stay_unknown = !self.runs_again || last.code != "outcome-unknown";
        if !last.is_final() || !may_stay_unknown {
            violations.push(format!("I7: there is no outcome in the end: {last:?}"));
        }
    }
}

/// The messages of one key. Its handler puts a message into the outbox in the transaction of its
/// effect. Each consumer handles the message in a transaction with an effect of its own.
#[derive(Clone, Debug)]
pub(crate) struct MessageHistory {
    /// The id of the message of each effect.
    pub(crate) put: Vec<String>,
    /// The ids of the messages that are in the outbox at the end.
    pub(crate) waiting: Vec<String>,
    /// The id and the payload of each publication.
    pub(crate) published: Vec<(String, String)>,
    pub(crate) consumers: &'static [&'static str],
    /// The consumer and the message of each effect of a consumer.
    pub(crate) handled: Vec<(String, String)>,
}

impl MessageHistory {
    /// Returns the violations of guarantees. Each begins with the name of an invariant.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut violations = Vec::new();
        for id in &self.waiting {
            violations.push(format!("I7: a message stays in the outbox: {id}"));
        }
        for id in &self.put {
            if !self.waiting.contains(id) && !self.published.iter().any(|(published, _)| published == id) {
                violations.push(format!("I3: an effect has lost its message: {id}"));
            }
        }
        let published: BTreeMap<_, _> = self.published.iter().cloned().collect();
        for (id, payload) in &self.published {
            if published[id] != *payload {
                violations.push(format!("I2: a message has several payloads: {id}"));
            }
        }
        for id in published.keys() {
            if !self.put.contains(id) {
                violations.push(format!(
                    "I3: a message has no effect in whose transaction it was put: {id}"
                ));
            }
            for consumer in self.consumers {
                let of_both = |(by, of): &&(String, String)| by == consumer && of == id;
                match self.handled.iter().filter(of_both).count() {
                    0 => violations.push(format!("I7: {consumer} has not handled a message: {id}")),
                    1 => {}
                    times => violations.push(format!("I3: {consumer} has handled a message {times} times: {id}")),
                }
            }
        }
        violations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(attempt: u32, fence: u64) -> Run {
        let had_no_effect = false;
        Run {
            attempt,
            fence,
            had_no_effect,
        }
    }

    fn seen(status: u16, code: &str, body: &str) -> Seen {
        Seen {
            status,
            code: code.to_owned(),
            body: body.to_owned(),
            is_other_body: false,
        }
    }

    fn sound() -> KeyHistory {
        KeyHistory {
            runs_again: true,
            sent: vec![false],
            runs: vec![run(2, 20), run(1, 10)],
            effects: vec![7],
            seen: vec![seen(503, "store-unavailable", ""), seen(201, "", "receipt 7 a")],
            evidence: Evidence::Completed,
        }
    }

    /// Changes a sound history, and checks which guarantees it violates.
    fn assert_violates(change: impl FnOnce(&mut KeyHistory), expected: &[&str]) {
        let mut history = sound();
        change(&mut history);
        let violations = history.violations();
        let names: Vec<_> = violations.iter().map(|what| &what[..2]).collect();
        assert_eq!(names, expected, "{violations:?}");
    }

    #[test]
    fn a_sound_history_violates_nothing() {
        assert_violates(|_| {}, &[]);
        // A run that failed without an effect was released, and a late completion is missing.
        assert_violates(
            |history| {
                history.runs_again = false;
                history.runs[0].attempt = 1;
                history.runs[1].had_no_effect = true;
                history.evidence = Evidence::Open;
                history.seen.push(seen(409, "outcome-unknown", ""));
            },
            &[],
        );
    }

    #[test]
    fn each_check_finds_its_violation() {
        assert_violates(|history| history.runs.push(run(3, 20)), &["I1"]);
        assert_violates(|history| history.runs_again = false, &["I1"]);
        assert_violates(|history| history.runs.push(run(2, 30)), &["I9"]);
        assert_violates(|history| history.runs.push(run(3, 15)), &["I9"]);
        assert_violates(|history| history.effects.push(8), &["I3"]);
        assert_violates(|history| history.effects[0] = 8, &["I3"]);
        assert_violates(|history| history.seen.push(seen(201, "", "receipt 7 b")), &["I2"]);
        assert_violates(
            |history| {
                history.seen.push(seen(201, "", "receipt 7 a"));
                history.seen[1].is_other_body = true;
            },
            &["I4"],
        );
        assert_violates(|history| history.seen.push(seen(422, "", "")), &["I4"]);
        assert_violates(|history| history.evidence = Evidence::Open, &["I5"]);
        assert_violates(|history| history.evidence = Evidence::Absent, &["I6", "I5"]);
        assert_violates(|history| history.seen.clear(), &["I7"]);
        assert_violates(|history| history.seen.push(seen(503, "store-unavailable", "")), &["I7"]);
        assert_violates(|history| history.seen.push(seen(409, "outcome-unknown", "")), &["I7"]);
    }

    fn pair(one: &str, other: &str) -> (String, String) {
        (one.to_owned(), other.to_owned())
    }

    /// Changes a sound history of messages, and checks which guarantees it violates.
    fn assert_messages_violate(change: impl FnOnce(&mut MessageHistory), expected: &[&str]) {
        let mut history = MessageHistory {
            put: vec!["m".to_owned()],
            waiting: Vec::new(),
            published: vec![pair("m", "a"), pair("m", "a")],
            consumers: &["x", "y"],
            handled: vec![pair("x", "m"), pair("y", "m")],
        };
        change(&mut history);
        let violations = history.violations();
        let names: Vec<_> = violations.iter().map(|what| &what[..2]).collect();
        assert_eq!(names, expected, "{violations:?}");
    }

    #[test]
    fn each_check_of_messages_finds_its_violation() {
        assert_messages_violate(|_| {}, &[]);
        assert_messages_violate(|history| history.waiting.push("m".to_owned()), &["I7"]);
        assert_messages_violate(|history| history.put.push("n".to_owned()), &["I3"]);
        assert_messages_violate(|history| history.published[0].1.push('b'), &["I2"]);
        assert_messages_violate(|history| history.put.clear(), &["I3"]);
        assert_messages_violate(|history| history.handled.truncate(1), &["I7"]);
        assert_messages_violate(|history| history.handled.push(pair("y", "m")), &["I3"]);
    }
}
