//! The wire format, specified in docs/migration.md, "Bytes".

pub(crate) mod chunk;
pub(crate) mod control;
pub(crate) mod frame;
pub(crate) mod stream;
