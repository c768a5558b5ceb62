//! The device's status of a page-bitmap message or of a driver's answer.

/// Bytes of the status: one little-endian `u32`.
pub const STATUS_BYTES: usize = 4;

/// The device's verdict on a message. All or nothing: a message with any fault has no
/// effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MessageStatus {
    /// Every block was accepted.
    Accepted = 0,
    /// The bytes are no sequence of records, or exceed the limits.
    Malformed = 1,
    /// A block is outside of guest memory.
    OutsideMemory = 2,
    /// A page is in the message twice.
    RepeatedPage = 3,
    /// Request queue: the request has ended, or never existed.
    Unwanted = 4,
}

impl MessageStatus {
    /// Returns the wire format.
    pub const fn to_bytes(self) -> [u8; STATUS_BYTES] {
        (self as u32).to_le_bytes()
    }

    /// Decodes the wire format; `None` if the value is undefined.
    pub const fn from_bytes(bytes: [u8; STATUS_BYTES]) -> Option<Self> {
        match u32::from_le_bytes(bytes) {
            0 => Some(Self::Accepted),
            1 => Some(Self::Malformed),
            2 => Some(Self::OutsideMemory),
            3 => Some(Self::RepeatedPage),
            4 => Some(Self::Unwanted),
            _ => None,
        }
    }
}
