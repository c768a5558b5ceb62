//! A picture.
use crate::free_map::FreePagesMap;
/// Draws.
pub(crate) fn draw(_name: &str, _map: &FreePagesMap) -> Result<Vec<u8>, png::EncodingError> {
    Ok(Vec::new())
}
