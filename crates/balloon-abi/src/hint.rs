//! Commands of free page hinting (virtio 1.3, section 5.5.6.5): a `u32` that the device
//! writes to `free_page_hint_cmd_id` and the driver sends on the queue.

/// Bytes of a command on the queue.
pub const COMMAND_BYTES: usize = 4;

/// A command of the device, or the id to which a driver's next pages belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HintCommand {
    /// Stop hinting (0). From the driver: hinting is complete.
    Stop,
    /// Hinting is done, and the guest may use the hinted pages again (1).
    Done,
    /// Hint free pages under this id.
    Hint(HintId),
}

impl HintCommand {
    /// Returns the wire value.
    pub const fn to_u32(self) -> u32 {
        match self {
            Self::Stop => 0,
            Self::Done => 1,
            Self::Hint(HintId(id)) => id,
        }
    }

    /// Decodes a wire value.
    pub const fn from_u32(number: u32) -> Self {
        match number {
            0 => Self::Stop,
            1 => Self::Done,
            id => Self::Hint(HintId(id)),
        }
    }
}

/// Command id of a request for hints: 2 or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HintId(u32);

impl HintId {
    /// The first id that a device uses. 0 and 1 are reserved. QEMU starts here too, which
    /// leaves values for more reserved ids.
    pub const FIRST: Self = Self(0x8000_0000);

    /// Returns the next id. Wraps around after 2^31 ids.
    #[must_use]
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(id) => Self(id),
            None => Self::FIRST,
        }
    }

    /// Returns the wire value.
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_inverts_encoding() {
        for number in [0, 1, 2, 0x7fff_ffff, 0x8000_0000, u32::MAX] {
            assert_eq!(HintCommand::from_u32(number).to_u32(), number);
        }
        assert_eq!(HintCommand::from_u32(0), HintCommand::Stop);
        assert_eq!(HintCommand::from_u32(1), HintCommand::Done);
    }

    #[test]
    fn ids_wrap_around_to_the_first() {
        assert_eq!(HintId::FIRST.next().get(), 0x8000_0001);
        assert_eq!(HintId(u32::MAX).next(), HintId::FIRST);
    }
}
