//! Numbers and strings in a frame's body. All little-endian.

use crate::error::MigrationError;

/// Reads a body from its start to its end.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

const SHORT: MigrationError = MigrationError::Peer { what: "a message is shorter than it must be" };
const LONG: MigrationError = MigrationError::Peer { what: "a message is longer than it may be" };
const RESERVED: MigrationError = MigrationError::Peer { what: "a reserved byte is not 0" };
const TEXT: MigrationError = MigrationError::Peer { what: "a name is no printable ASCII" };

impl<'a> Reader<'a> {
    pub(crate) const fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], MigrationError> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(SHORT)?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], MigrationError> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>().ok_or(SHORT)?;
        self.rest = rest;
        Ok(*bytes)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, MigrationError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, MigrationError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, MigrationError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, MigrationError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of things, at most `most`.
    pub(crate) fn count(&mut self, most: usize) -> Result<usize, MigrationError> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count > most { Err(LONG) } else { Ok(count) }
    }

    /// Bytes that have no meaning yet.
    pub(crate) fn reserved(&mut self, len: usize) -> Result<(), MigrationError> {
        let zeros = self.bytes(len)?.iter().all(|byte| *byte == 0);
        if zeros { Ok(()) } else { Err(RESERVED) }
    }

    /// A string of at most `most` bytes behind its length.
    pub(crate) fn text(&mut self, most: usize) -> Result<String, MigrationError> {
        let len = self.count(most)?;
        let bytes = self.bytes(len)?;
        if !bytes.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(TEXT);
        }
        Ok(bytes.iter().copied().map(char::from).collect())
    }

    /// Nothing may be left.
    pub(crate) fn end(self) -> Result<(), MigrationError> {
        if self.rest.is_empty() { Ok(()) } else { Err(LONG) }
    }
}

/// Writes a body.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number of things, which the caller keeps within its limit.
    pub(crate) fn count(self, count: usize) -> Self {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX))
    }

    /// A string of at most `most` bytes, cut there, with everything but printable ASCII as `?`.
    pub(crate) fn text(self, text: &str, most: usize) -> Self {
        let printable = |byte: u8| if matches!(byte, b' '..=b'~') { byte } else { b'?' };
        let bytes: Vec<u8> = text.bytes().take(most).map(printable).collect();
        self.count(bytes.len()).bytes(&bytes)
    }
}
