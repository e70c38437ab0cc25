//! The time that the layer adds to a request, compared with a hand-written middleware without
//! guarantees.
//!
//! `cargo bench --features axum --bench overhead` prints the table of `benches/README.md` in about
//! 90 seconds. With `-- --quick` it prints a rough table in 10 seconds. There is one process, one
//! current-thread runtime, and no network. The variants take turns in short rounds, so that a slow
//! moment of the machine slows all of them. The figures are medians over the rounds.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the machine's clock")]

mod common;

use std::time::{Duration, Instant};

use common::{Bench, Kind, SETTINGS, Setting, Variant};
use tokio::runtime::{Builder, Runtime};

/// The effort for one kind of request.
struct Effort {
    /// The time for all rounds.
    time: Duration,
    /// The largest number of stored keys. Settings with more keys are left out.
    most_stored: u64,
}

/// Nanoseconds per request. Each round has one figure for each variant.
struct Rounds(Vec<[f64; Variant::ALL.len()]>);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` starts this program, too.
    if !arguments.iter().any(|argument| argument == "--bench") {
        return;
    }
    let effort = if arguments.iter().any(|argument| argument == "--quick") {
        Effort {
            time: Duration::from_millis(500),
            most_stored: 50_000,
        }
    } else {
        Effort {
            time: Duration::from_secs(5),
            most_stored: u64::MAX,
        }
    };
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime without threads starts");
    println!("Time added to a request, in µs (the first column is the whole time of the bare service):\n");
    println!("| request | bare service | layer that does nothing | hand-written | this layer | ratio | target |");
    println!("|---|--:|--:|--:|--:|--:|--:|");
    for setting in SETTINGS
        .iter()
        .filter(|setting| setting.stored_keys <= effort.most_stored)
    {
        measure(&runtime, setting, &effort);
    }
    println!(
        "\nThe ratio compares this layer with the hand-written middleware. Without a key, the column has the difference \
         to the layer that does nothing."
    );
}

fn measure(runtime: &Runtime, setting: &Setting, effort: &Effort) {
    let mut benches = Variant::ALL.map(|variant| runtime.block_on(Bench::new(setting, variant)));
    let batch = if setting.body > 100_000 { 10 } else { 400 };
    for kind in setting.kinds {
        // Warm the caches of the processor and of the allocator.
        for _ in 0..3 {
            round(runtime, &mut benches, *kind, batch, 0);
        }
        let started = Instant::now();
        let mut rounds = Rounds(Vec::new());
        while started.elapsed() < effort.time {
            let first = rounds.0.len();
            rounds.0.push(round(runtime, &mut benches, *kind, batch, first));
        }
        rounds.print(setting, *kind);
    }
}

/// Runs every variant once. Each round begins with the next variant.
fn round(
    runtime: &Runtime,
    benches: &mut [Bench; Variant::ALL.len()],
    kind: Kind,
    batch: u64,
    first: usize,
) -> [f64; Variant::ALL.len()] {
    let mut nanos = [0.0; Variant::ALL.len()];
    for turn in 0..benches.len() {
        let at = (first + turn) % benches.len();
        let requests = benches[at].requests(kind, batch);
        let started = Instant::now();
        runtime.block_on(benches[at].send(kind, requests));
        nanos[at] = started.elapsed().as_secs_f64() * 1e9 / batch as f64;
    }
    nanos
}

impl Rounds {
    fn print(&self, setting: &Setting, kind: Kind) {
        let bare = self.median(|of| of(Variant::Bare)) / 1e3;
        let added = |variant| self.median(|of| of(variant) - of(Variant::Bare)) / 1e3;
        let (nothing, hand, layer) = (
            added(Variant::Forward),
            added(Variant::HandWritten),
            added(Variant::Layer),
        );
        let (name, ratio, target) = match kind {
            Kind::NoKey => ("no key", format!("{:+.2} µs", layer - nothing), "±0"),
            Kind::First => ("first run", format!("{:.2}", layer / hand), target(setting)),
            Kind::Replay => ("replay", format!("{:.2}", layer / hand), target(setting)),
        };
        println!(
            "| {name}, {} | {bare:.2} | {nothing:.2} | {hand:.2} | {layer:.2} | {ratio} | {target} |",
            setting.name
        );
        let spreads = Variant::ALL.map(|variant| {
            let added = added(variant);
            format!("{} {added:.2} ({:.2})", variant.name(), self.spread(variant) / 1e3)
        });
        eprintln!("    {} rounds, added (spread): {}", self.0.len(), spreads.join(", "));
    }

    fn sorted(&self, figure: impl Fn(&dyn Fn(Variant) -> f64) -> f64) -> Vec<f64> {
        let of_round = |round: &[f64; Variant::ALL.len()]| {
            figure(&|variant| {
                let at = Variant::ALL.iter().position(|other| *other == variant);
                at.map_or(f64::NAN, |at| round[at])
            })
        };
        let mut figures: Vec<f64> = self.0.iter().map(of_round).collect();
        figures.sort_by(f64::total_cmp);
        figures
    }

    fn median(&self, figure: impl Fn(&dyn Fn(Variant) -> f64) -> f64) -> f64 {
        let sorted = self.sorted(figure);
        sorted[sorted.len() / 2]
    }

    /// Returns the distance between the quartiles.
    fn spread(&self, variant: Variant) -> f64 {
        let sorted = self.sorted(|of| of(variant));
        sorted[sorted.len() * 3 / 4] - sorted[sorted.len() / 4]
    }
}

const fn target(setting: &Setting) -> &'static str {
    if setting.body > 100_000 { "≤ 0.35" } else { "≤ 1.00" }
}
