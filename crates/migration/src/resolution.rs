//! The outcome of a two-phase commit.

/// Where a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// It runs at the destination, and never again at the source.
    RunsAtDestination,
    /// The destination destroyed it before it ran, and never runs it: the source has it.
    NeverRan,
    /// It is prepared at the destination, whole and paused, and the source's decision is not known.
    InDoubt,
}
