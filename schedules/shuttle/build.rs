//! Compiles the crate's sources with the locks and atomics of shuttle.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=tower_idempotency_shuttle");
}
