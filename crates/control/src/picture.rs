//! Picture of a guest's memory: free, in use, and in the balloon.

mod font;

use page_set::PageRange;
use png::{BitDepth, ColorType, Encoder, EncodingError};

use crate::api::BALLOON_PAGE_BYTES;
use crate::free_map::{FreePagesMap, cell_pages, counts};
use crate::size::Size;

/// Squares per row. With the address labels a picture is 912 pixels wide.
const COLUMNS: usize = 256;
/// Side length of a square in pixels.
const SIDE: usize = 3;
/// Limit of squares, not counting partly filled rows: 192 rows.
const MAX_SQUARES: u64 = 192 * COLUMNS as u64;
/// Limit of regions drawn; a VMM's memory table has fewer.
const MAX_REGIONS: usize = 64;

/// Pixels per glyph pixel.
const TEXT_SCALE: usize = 2;
const LETTER_WIDTH: usize = (font::WIDTH + 1) * TEXT_SCALE;
const LINE_HEIGHT: usize = (font::HEIGHT + 4) * TEXT_SCALE;
const MARGIN: usize = 16;
/// Width of the address labels: 8 letters and a tick.
const LABELS: usize = 8 * LETTER_WIDTH + 16;
/// Minimum pixels between two address labels.
const LABEL_DISTANCE: usize = 48;
/// Pixels between two regions.
const REGION_GAP: usize = 12;
/// Height of title, scale and legend.
const HEAD: usize = MARGIN + 3 * LINE_HEIGHT + 10;

type Color = [u8; 3];
const PAPER: Color = [255, 255, 255];
const INK: Color = [40, 44, 52];
const FREE: Color = [184, 225, 190];
const USED: Color = [46, 88, 140];
const BALLOON: Color = [244, 160, 60];

/// Draws the picture and returns it as PNG.
pub(crate) fn draw(name: &str, map: &FreePagesMap) -> Result<Vec<u8>, EncodingError> {
    let regions = &map.regions[..map.regions.len().min(MAX_REGIONS)];
    let square_pages = cell_pages(regions, MAX_SQUARES);
    let row_pages = square_pages.saturating_mul(COLUMNS as u64);
    let rows =
        |region: &PageRange| usize::try_from(region.pages().div_ceil(row_pages)).unwrap_or(0);
    let height: usize = regions.iter().map(|region| rows(region) * SIDE + REGION_GAP).sum();
    let mut canvas = Canvas::new(MARGIN * 2 + LABELS + COLUMNS * SIDE, HEAD + height + MARGIN);
    canvas.head(name, map, square_pages);
    let mut top = HEAD;
    for region in regions {
        canvas.region(map, *region, square_pages, top);
        canvas.labels(*region, row_pages, rows(region), top);
        top += rows(region) * SIDE + REGION_GAP;
    }
    canvas.encode()
}

/// RGB pixels, row by row from the top.
struct Canvas {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self { width, height, pixels: PAPER.repeat(width * height) }
    }

    /// Draws title, scale and legend.
    fn head(&mut self, name: &str, map: &FreePagesMap, square_pages: u64) {
        let size = |pages: u64| Size(pages.saturating_mul(BALLOON_PAGE_BYTES));
        let summary = &map.summary;
        let (kind, id) = (summary.kind.as_str(), summary.id);
        let memory: u64 = map.regions.iter().map(|region| region.pages()).sum();
        let title = format!("{name}: {} of memory, {kind} {id}", size(memory));
        self.text(MARGIN, MARGIN, &title);
        let row = size(square_pages.saturating_mul(COLUMNS as u64));
        let scale = format!("a square is {}, a row {row}", size(square_pages));
        self.text(MARGIN, MARGIN + LINE_HEIGHT, &scale);
        let balloon = map.balloon.len().min(memory);
        let free = map.free.len().min(memory - balloon);
        let legend = [
            (FREE, "free", free),
            (USED, "in use", memory - balloon - free),
            (BALLOON, "balloon", balloon),
        ];
        let (mut left, top) = (MARGIN, MARGIN + 2 * LINE_HEIGHT);
        let side = font::HEIGHT * TEXT_SCALE;
        for (color, label, pages) in legend {
            self.fill(left, top, side, side, INK);
            self.fill(left + 1, top + 1, side - 2, side - 2, color);
            let percent = pages.saturating_mul(100) / memory.max(1);
            let text = format!("{label} {} ({percent} %)", size(pages));
            left = self.text(left + side + 8, top, &text) + 28;
        }
    }

    fn region(&mut self, map: &FreePagesMap, region: PageRange, square_pages: u64, top: usize) {
        let free = counts(&map.free, region, square_pages);
        let balloon = counts(&map.balloon, region, square_pages);
        for (square, (free, balloon)) in free.into_iter().zip(balloon).enumerate() {
            let before = (square as u64).saturating_mul(square_pages);
            let pages = region.pages().saturating_sub(before).min(square_pages);
            let (row, column) = (square / COLUMNS, square % COLUMNS);
            let left = MARGIN + LABELS + column * SIDE;
            self.fill(left, top + row * SIDE, SIDE, SIDE, mix(pages, free, balloon));
        }
    }

    /// Draws address labels at the region's start and then at equal distances.
    fn labels(&mut self, region: PageRange, row_pages: u64, rows: usize, top: usize) {
        let step = (LABEL_DISTANCE / SIDE).next_power_of_two();
        for row in (0..rows).step_by(step) {
            let page = region.start().saturating_add((row as u64).saturating_mul(row_pages));
            let address = Size(page.saturating_mul(BALLOON_PAGE_BYTES));
            let text = format!("{address:#}");
            let text = if text.len() > 8 { format!("{:.2}G", gib(address.0)) } else { text };
            let width = text.len() * LETTER_WIDTH;
            let line = top + row * SIDE;
            self.text((MARGIN + LABELS).saturating_sub(width + 14), line, &text);
            self.fill(MARGIN + LABELS - 10, line, 8, 1, INK);
        }
    }

    /// Draws a line of text and returns the x coordinate of its end.
    fn text(&mut self, left: usize, top: usize, text: &str) -> usize {
        let mut left = left;
        for letter in text.chars() {
            for (y, row) in font::rows(letter).into_iter().enumerate() {
                for x in 0..font::WIDTH {
                    if row >> (font::WIDTH - 1 - x) & 1 == 1 {
                        let (x, y) = (left + x * TEXT_SCALE, top + y * TEXT_SCALE);
                        self.fill(x, y, TEXT_SCALE, TEXT_SCALE, INK);
                    }
                }
            }
            left += LETTER_WIDTH;
        }
        left
    }

    /// Fills a rectangle, clipped to the canvas.
    fn fill(&mut self, left: usize, top: usize, width: usize, height: usize, color: Color) {
        let right = (left + width).min(self.width);
        for y in top..(top + height).min(self.height) {
            let row = y * self.width;
            if let Some(pixels) = self.pixels.get_mut((row + left) * 3..(row + right) * 3) {
                pixels.as_chunks_mut::<3>().0.fill(color);
            }
        }
    }

    fn encode(&self) -> Result<Vec<u8>, EncodingError> {
        let side = |pixels: usize| u32::try_from(pixels).map_err(std::io::Error::other);
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, side(self.width)?, side(self.height)?);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(file)
    }
}

/// Returns the colour of a square: the average over its pages.
fn mix(pages: u64, free: u64, balloon: u64) -> Color {
    let pages = pages.max(1);
    let balloon = balloon.min(pages);
    // A page reported free may be in the balloon by now.
    let free = free.min(pages - balloon);
    let used = pages - balloon - free;
    std::array::from_fn(|i| {
        let part = |color: Color, share: u64| u64::from(color[i]).saturating_mul(share);
        let sum = part(FREE, free) + part(USED, used) + part(BALLOON, balloon);
        u8::try_from(sum / pages).unwrap_or(u8::MAX)
    })
}

fn gib(bytes: u64) -> f64 {
    // Two decimals are printed.
    (bytes >> 20) as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use page_set::PageSet;

    use super::*;
    use crate::api::FreePages;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    /// A guest of 4 GiB with the PC's hole below 4 GiB, free blocks of all sizes, and 1 GiB in the
    /// balloon.
    fn guest() -> FreePagesMap {
        let regions = vec![range(0, 3 << 18), range(4 << 18, 1 << 18)];
        let mut free = PageSet::from_iter([range(1 << 17, 1 << 17), range(4 << 18, 3 << 16)]);
        let mut seed = 7u64;
        for i in 0..4000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            free.insert(range((seed >> 33) % (3 << 18), 1 << (i % 9)));
        }
        let balloon = PageSet::from_iter([range(1 << 19, 1 << 18)]);
        free.subtract(&balloon);
        let summary = FreePages { id: 7, ..FreePages::default() };
        FreePagesMap { summary, regions, free: Arc::new(free), balloon }
    }

    fn decode(png: &[u8]) -> (usize, usize, Vec<u8>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        (info.width as usize, info.height as usize, pixels)
    }

    #[test]
    fn squares_have_the_colour_of_their_pages() {
        let map = guest();
        let png = draw("web-1", &map).unwrap();
        if let Some(path) = std::env::var_os("AEROSTAT_PICTURE") {
            std::fs::write(path, &png).unwrap();
        }
        let (width, height, pixels) = decode(&png);
        assert!(width <= 1024 && height <= 768, "{width} x {height}");
        // 32 pages per square, so 8192 per row.
        let at = |page: usize| {
            let (row, column) = (page / 8192, page % 8192 / 32);
            let pixel = ((HEAD + row * SIDE + 1) * width + MARGIN + LABELS + column * SIDE + 1) * 3;
            [pixels[pixel], pixels[pixel + 1], pixels[pixel + 2]]
        };
        assert_eq!(at(1 << 17), FREE);
        assert_eq!(at((1 << 18) - 1), FREE);
        assert_eq!(at(1 << 19), BALLOON);
        assert_eq!(at((3 << 18) - 1), BALLOON);
        let used = (0..1 << 17).step_by(32).filter(|page| at(*page) == USED).count();
        assert!(used > 1000, "{used}");
        assert_eq!(mix(32, 0, 0), USED);
        assert_eq!(mix(2, 1, 1), std::array::from_fn(|i| FREE[i].midpoint(BALLOON[i])));
        assert_eq!(mix(4, 9, 9), BALLOON);
    }

    #[test]
    fn the_picture_has_bounded_size_for_any_guest() {
        let one = |start, pages| FreePagesMap {
            regions: vec![range(start, pages)],
            ..FreePagesMap::default()
        };
        let many = FreePagesMap {
            regions: (0..1000).map(|i| range(i * 10, 1)).collect(),
            ..FreePagesMap::default()
        };
        for map in [FreePagesMap::default(), one(5, 1), one(0, 1 << 40), one(1 << 51, 77), many] {
            let (width, height, _) = decode(&draw(&"x".repeat(64), &map).unwrap());
            assert!(width <= 1024 && height <= 1500, "{width} x {height}");
        }
    }
}
