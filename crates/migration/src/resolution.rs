//! What is known of a guest after the commit of its switchover.

/// Where a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It runs at the destination, and never again at the source.
    RunsAtDestination,
    /// The destination destroyed it before it ran, and never runs it: it is the source's.
    NeverRan,
    /// It is whole and paused at the destination, which does not know what the source decided.
    InDoubt,
}
