//! What the two sides say to each other; docs/migration.md draws it.

pub(crate) mod chunk;
pub(crate) mod control;
pub(crate) mod frame;
pub(crate) mod stream;
