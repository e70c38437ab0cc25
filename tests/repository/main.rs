//! Checks of the repository itself: its layers, its prose, and the package that is published.

mod layering;
mod package;
mod prose;
