//! Draws a guest's memory as an SVG picture: free, in use, and in the balloon.

use std::fmt::Write as _;

use page_set::PageRange;

use crate::api::BALLOON_PAGE_BYTES;
use crate::free_map::{FreePagesMap, cell_pages, counts};
use crate::size::Size;

/// Squares in a row.
const COLUMNS: usize = 256;
/// Side of a square, in pixels.
const SIDE: usize = 3;
/// Squares in all: 192 rows. Each region adds at most one row that it does not fill.
const MAX_SQUARES: u64 = 192 * COLUMNS as u64;
/// Regions that are drawn. A guest's memory has fewer.
const MAX_REGIONS: usize = 64;

/// Pixels around everything, for a line of text, for the addresses, and between two regions.
const MARGIN: usize = 16;
const LINE_HEIGHT: usize = 20;
const LABELS: usize = 80;
const REGION_GAP: usize = 12;
/// Title, scale and legend.
const HEAD: usize = MARGIN + 3 * LINE_HEIGHT + 10;
const WIDTH: usize = MARGIN * 2 + LABELS + COLUMNS * SIDE;
/// Least distance between two addresses, in pixels.
const LABEL_DISTANCE: usize = 48;

type Color = [u8; 3];
const FREE: Color = [184, 225, 190];
const USED: Color = [46, 88, 140];
const BALLOON: Color = [244, 160, 60];

/// Returns the picture as an SVG document.
pub(crate) fn draw(name: &str, map: &FreePagesMap) -> String {
    let regions = &map.regions[..map.regions.len().min(MAX_REGIONS)];
    let square_pages = cell_pages(regions, MAX_SQUARES);
    let row_pages = square_pages.saturating_mul(COLUMNS as u64);
    let rows =
        |region: &PageRange| usize::try_from(region.pages().div_ceil(row_pages)).unwrap_or(0);
    let height: usize = regions.iter().map(|region| rows(region) * SIDE + REGION_GAP).sum();
    let height = HEAD + height + MARGIN;
    let mut svg = Svg(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"14\" shape-rendering=\"crispEdges\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    ));
    svg.head(name, map, square_pages);
    let mut top = HEAD;
    for region in regions {
        svg.region(map, *region, square_pages, top);
        svg.labels(*region, row_pages, rows(region), top);
        top += rows(region) * SIDE + REGION_GAP;
    }
    svg.0.push_str("</svg>\n");
    svg.0
}

/// The document so far. Writing to a `String` cannot fail.
struct Svg(String);

impl Svg {
    /// Title, scale, and what the colours mean.
    fn head(&mut self, name: &str, map: &FreePagesMap, square_pages: u64) {
        let size = |pages: u64| Size(pages.saturating_mul(BALLOON_PAGE_BYTES));
        let summary = &map.summary;
        let (kind, id) = (summary.kind.as_str(), summary.id);
        let memory: u64 = map.regions.iter().map(|region| region.pages()).sum();
        self.text(
            MARGIN,
            MARGIN,
            "start",
            &format!("{name}: {} of memory, {kind} {id}", size(memory)),
        );
        let row = size(square_pages.saturating_mul(COLUMNS as u64));
        let scale = format!("one square is {}, one row is {row}", size(square_pages));
        self.text(MARGIN, MARGIN + LINE_HEIGHT, "start", &scale);
        let balloon = map.balloon.len().min(memory);
        let free = map.free.len().min(memory - balloon);
        let legend = [
            (FREE, "free", free),
            (USED, "in use", memory - balloon - free),
            (BALLOON, "balloon", balloon),
        ];
        let top = MARGIN + 2 * LINE_HEIGHT;
        for (number, (color, word, pages)) in legend.into_iter().enumerate() {
            let left = MARGIN + number * (WIDTH - 2 * MARGIN) / 3;
            self.rect((left, top), (14, 14), color);
            let percent = pages.saturating_mul(100) / memory.max(1);
            self.text(left + 22, top, "start", &format!("{word} {} ({percent} %)", size(pages)));
        }
    }

    /// One rectangle for each run of squares of one colour in a row.
    fn region(&mut self, map: &FreePagesMap, region: PageRange, square_pages: u64, top: usize) {
        let free = counts(&map.free, region, square_pages);
        let balloon = counts(&map.balloon, region, square_pages);
        let squares = free.into_iter().zip(balloon).enumerate().map(|(square, (free, balloon))| {
            let before = (square as u64).saturating_mul(square_pages);
            mix(region.pages().saturating_sub(before).min(square_pages), free, balloon)
        });
        let squares: Vec<Color> = squares.collect();
        for (row, colors) in squares.chunks(COLUMNS).enumerate() {
            let mut left = MARGIN + LABELS;
            for run in colors.chunk_by(|one, next| one == next) {
                let width = run.len() * SIDE;
                self.rect((left, top + row * SIDE), (width, SIDE), run[0]);
                left += width;
            }
        }
    }

    /// Addresses beside rows: at the region's start, then at equal distances.
    fn labels(&mut self, region: PageRange, row_pages: u64, rows: usize, top: usize) {
        let step = (LABEL_DISTANCE / SIDE).next_power_of_two();
        for row in (0..rows).step_by(step) {
            let page = region.start().saturating_add((row as u64).saturating_mul(row_pages));
            let address = Size(page.saturating_mul(BALLOON_PAGE_BYTES));
            self.text(MARGIN + LABELS - 8, top + row * SIDE, "end", &format!("{address:#}"));
        }
    }

    /// A line of text whose upper edge is at `top`.
    fn text(&mut self, left: usize, top: usize, anchor: &str, text: &str) {
        let baseline = top + 12;
        let _ = write!(self.0, "<text x=\"{left}\" y=\"{baseline}\" text-anchor=\"{anchor}\">");
        for letter in text.chars() {
            match letter {
                '<' => self.0.push_str("&lt;"),
                '&' => self.0.push_str("&amp;"),
                letter if letter.is_control() => self.0.push('\u{fffd}'),
                letter => self.0.push(letter),
            }
        }
        self.0.push_str("</text>\n");
    }

    fn rect(&mut self, (left, top): (usize, usize), (width, height): (usize, usize), color: Color) {
        let [red, green, blue] = color;
        let _ = writeln!(
            self.0,
            "<rect x=\"{left}\" y=\"{top}\" width=\"{width}\" height=\"{height}\" \
             fill=\"#{red:02x}{green:02x}{blue:02x}\"/>"
        );
    }
}

/// The colour of a square, in proportion to its pages.
fn mix(pages: u64, free: u64, balloon: u64) -> Color {
    let pages = pages.max(1);
    let balloon = balloon.min(pages);
    // A page that was free may have gone into the balloon since.
    let free = free.min(pages - balloon);
    let used = pages - balloon - free;
    std::array::from_fn(|i| {
        let part = |color: Color, share: u64| u64::from(color[i]).saturating_mul(share);
        let sum = part(FREE, free) + part(USED, used) + part(BALLOON, balloon);
        u8::try_from(sum / pages).unwrap_or(u8::MAX)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use page_set::PageSet;

    use super::*;
    use crate::api::FreePages;

    /// Most bytes of a picture: a rectangle for each square.
    const MAX_BYTES: usize = 72 * (192 + MAX_REGIONS) * COLUMNS;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::new(start, pages).unwrap()
    }

    /// A guest of 4 GiB with the PC's hole below 4 GiB: free memory in pieces of all sizes, and 1 GiB
    /// in the balloon.
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

    /// The value of an attribute of an element.
    fn attribute<'a>(element: &'a str, name: &str) -> &'a str {
        let (_, rest) = element.split_once(&format!(" {name}=\"")).unwrap();
        rest.split_once('"').unwrap().0
    }

    /// The colour of the square at a place, by the last rectangle there.
    fn color_at(svg: &str, x: usize, y: usize) -> String {
        let rects = svg.lines().filter(|line| line.starts_with("<rect x="));
        let covers = |rect: &&str| {
            let number = |name| attribute(rect, name).parse::<usize>().unwrap();
            (number("x")..number("x") + number("width")).contains(&x)
                && (number("y")..number("y") + number("height")).contains(&y)
        };
        attribute(rects.rev().find(covers).unwrap(), "fill").to_owned()
    }

    fn hex([red, green, blue]: Color) -> String {
        format!("#{red:02x}{green:02x}{blue:02x}")
    }

    #[test]
    fn squares_have_the_colors_of_their_pages() {
        let svg = draw("web-1", &guest());
        if let Some(path) = std::env::var_os("AEROSTAT_PICTURE") {
            std::fs::write(path, &svg).unwrap();
        }
        // 32 pages a square, so 8192 a row.
        let at = |page: usize| {
            let (row, column) = (page / 8192, page % 8192 / 32);
            color_at(&svg, MARGIN + LABELS + column * SIDE + 1, HEAD + row * SIDE + 1)
        };
        assert_eq!([at(1 << 17), at((1 << 18) - 1)], [hex(FREE), hex(FREE)]);
        assert_eq!([at(1 << 19), at((3 << 18) - 1)], [hex(BALLOON), hex(BALLOON)]);
        let used = (0..1 << 17).step_by(1024).filter(|page| at(*page) == hex(USED)).count();
        assert!(used > 30, "{used}");
        assert_eq!(mix(32, 0, 0), USED);
        assert_eq!(mix(2, 1, 1), std::array::from_fn(|i| FREE[i].midpoint(BALLOON[i])));
        assert_eq!(mix(4, 9, 9), BALLOON);
    }

    #[test]
    fn a_guest_of_any_size_has_a_picture_of_bounded_size() {
        let one = |start, pages| FreePagesMap {
            regions: vec![range(start, pages)],
            ..FreePagesMap::default()
        };
        let many = FreePagesMap {
            regions: (0..1000).map(|i| range(i * 10, 1)).collect(),
            ..FreePagesMap::default()
        };
        // Every square differs from its neighbour.
        let mixed = FreePagesMap {
            regions: vec![range(0, 1 << 20)],
            free: Arc::new((0..1 << 14).map(|i| range(i * 64, 1 + i % 31)).collect()),
            ..FreePagesMap::default()
        };
        for map in
            [FreePagesMap::default(), one(5, 1), one(0, 1 << 40), one(1 << 51, 77), many, mixed]
        {
            let svg = draw(&"x".repeat(64), &map);
            let height: usize = attribute(&svg, "height").parse().unwrap();
            assert!(height <= 1500 && svg.len() < MAX_BYTES, "{height}, {} bytes", svg.len());
        }
    }

    #[test]
    fn a_name_cannot_add_elements() {
        let svg = draw("<script>&\u{1b}", &FreePagesMap::default());
        assert!(svg.contains("&lt;script>&amp;\u{fffd}: "), "{svg}");
    }
}
