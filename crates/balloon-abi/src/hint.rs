//! Commands of free page hinting (virtio 1.3, section 5.5.6.5): a `u32` that the
//! device shows in `free_page_hint_cmd_id` and the driver repeats.

/// Bytes of a command on the queue.
pub const COMMAND_BYTES: usize = 4;

/// What the device asks for, or what a driver says its pages belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HintCommand {
    /// Stop hinting (0). From the driver: there is no more to hint.
    Stop,
    /// Stop hinting, and use the hinted pages again (1).
    Done,
    /// Hint what is free, under this number.
    Hint(HintId),
}

impl HintCommand {
    /// The number on the wire.
    pub const fn to_u32(self) -> u32 {
        match self {
            Self::Stop => 0,
            Self::Done => 1,
            Self::Hint(HintId(id)) => id,
        }
    }

    /// What a number on the wire means.
    pub const fn from_u32(number: u32) -> Self {
        match number {
            0 => Self::Stop,
            1 => Self::Done,
            id => Self::Hint(HintId(id)),
        }
    }
}

/// Number of one request for hints: 2 or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintId(u32);

impl HintId {
    /// The first that a device hands out. 0 and 1 have their own meaning; QEMU
    /// begins here, which leaves room for more of these.
    pub const FIRST: Self = Self(0x8000_0000);

    /// The number that follows: after 2^31 of them they begin anew.
    #[must_use]
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(id) => Self(id),
            None => Self::FIRST,
        }
    }

    /// The number on the wire.
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_numbers_are_inverse() {
        for number in [0, 1, 2, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            assert_eq!(HintCommand::from_u32(number).to_u32(), number);
        }
        assert_eq!(HintCommand::from_u32(0), HintCommand::Stop);
        assert_eq!(HintCommand::from_u32(1), HintCommand::Done);
    }

    #[test]
    fn numbers_go_around_and_never_become_a_command() {
        assert_eq!(HintId::FIRST.next().get(), 0x8000_0001);
        assert_eq!(HintId(u32::MAX).next(), HintId::FIRST);
    }
}
