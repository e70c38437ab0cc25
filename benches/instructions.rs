//! Sends a number of requests of one case and measures nothing: for `instructions.sh`, which counts instructions and
//! allocations under valgrind.
//!
//! Arguments: a case and a variant as `list` prints them, how many requests to send, and how many to build. What is built and
//! not sent is the same in two runs that differ in what is sent.

mod common;

use common::{noise, Bench, Kind, Setting, Variant, SETTINGS};
use sha2::{Digest, Sha256};
use tokio::runtime::Builder;

/// A million keys would take valgrind an hour.
const MOST_HELD: u64 = 1_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["list"] => cases().for_each(|(setting, kind)| println!("{}", name(setting, kind))),
        [case, variant, send, build] => {
            let (setting, kind) = cases()
                .find(|(setting, kind)| name(setting, *kind) == case)
                .expect("the case is one of the list");
            let [send, build] = [send, build].map(|count| count.parse().expect("a number of requests"));
            run(setting, kind, variant, send, build);
        }
        _ => eprintln!("see benches/instructions.sh"),
    }
}

fn cases() -> impl Iterator<Item = (&'static Setting, Kind)> {
    let settings = SETTINGS.iter().filter(|setting| setting.held <= MOST_HELD);
    settings.flat_map(|setting| setting.kinds.iter().map(move |kind| (setting, *kind)))
}

fn name(setting: &Setting, kind: Kind) -> String {
    format!("{kind:?}, {}", setting.name)
}

fn run(setting: &Setting, kind: Kind, variant: &str, send: u64, build: u64) {
    // The hashes by themselves: valgrind's processor has no instructions for SHA-256, where most real ones have.
    let body = noise(setting.body);
    match variant {
        "sha-256" => {
            for _ in 0..send {
                std::hint::black_box(Sha256::digest(std::hint::black_box(&body)));
            }
        }
        "blake3" => {
            for _ in 0..send {
                std::hint::black_box(blake3::hash(std::hint::black_box(&body)));
            }
        }
        _ => {
            let variant = Variant::ALL.into_iter().find(|other| other.name() == variant);
            let variant = variant.expect("the variant is one of those in benches/common");
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime without threads starts");
            let mut bench = runtime.block_on(Bench::new(setting, variant));
            let mut requests = bench.requests(kind, build);
            let rest = requests.split_off(usize::try_from(send).expect("few requests"));
            runtime.block_on(bench.send(kind, requests));
            std::mem::forget(rest);
            // Nothing is dropped that would depend on how much was sent.
            std::process::exit(0);
        }
    }
}
