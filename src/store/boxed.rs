//! A store that is chosen at run time.
