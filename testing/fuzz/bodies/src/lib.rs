//! The fuzz targets as functions of bytes. Each panics if an invariant does not hold.
//!
//! Bytes are read as a script of small steps, so every input is a valid script, the fuzzer's
//! changes are small, and valid steps are as likely as hostile ones.

#![forbid(unsafe_code)]

mod checked;
mod disk;
mod guest_queues;
mod machine;
mod migration;
mod queue;
mod records;
mod requests;
mod script;
mod vhost_user;

pub use disk::disk_queue;
pub use guest_queues::{hint_queue, reporting_queue, stats_queue};
pub use machine::machine;
pub use migration::migration;
pub use queue::{deflate_queue, inflate_queue};
pub use records::records;
pub use requests::request_queue;
pub use vhost_user::vhost_user;

/// Function of a target.
pub type Body = fn(&[u8]);

/// All targets by name, which is also the name of the corpus.
pub const TARGETS: [(&str, Body); 11] = [
    ("disk_queue", disk_queue),
    ("stats_queue", stats_queue),
    ("hint_queue", hint_queue),
    ("reporting_queue", reporting_queue),
    ("inflate_queue", inflate_queue),
    ("deflate_queue", deflate_queue),
    ("machine", machine),
    ("migration", migration),
    ("records", records),
    ("request_queue", request_queue),
    ("vhost_user", vhost_user),
];
