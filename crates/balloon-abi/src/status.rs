//! The device's answer to a page-bitmap message or to a driver's answer.

/// Bytes of the answer: one little-endian `u32`.
pub const STATUS_BYTES: usize = 4;

/// What the device thought of a message. It is all or nothing: a
/// message with any fault in it is not acted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MessageStatus {
    /// Every block was accepted.
    Accepted = 0,
    /// The bytes are no run of records, or more than the limits allow.
    Malformed = 1,
    /// A block lies outside of guest memory.
    OutsideMemory = 2,
    /// A page stands in the message twice.
    RepeatedPage = 3,
    /// Request queue: nobody waits for answers to this request.
    Unwanted = 4,
}

impl MessageStatus {
    /// The wire form.
    pub const fn to_bytes(self) -> [u8; STATUS_BYTES] {
        (self as u32).to_le_bytes()
    }

    /// Reads the wire form; `None` for a value that no version defines.
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
