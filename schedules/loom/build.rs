//! Compiles the crate's sources with the locks and atomics of loom.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cfg=tower_idempotency_loom");
}
