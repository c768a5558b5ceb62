//! Text map of a guest's memory.

use std::fmt::Write;
use std::io::IsTerminal;

use control::Size;
use control::api::{BALLOON_PAGE_BYTES, CoarseMap, CoarseRegion};

/// Cells per line: less than 80 columns with the address.
const LINE_CELLS: usize = 64;

/// How to draw cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Unicode block elements: darker means more in use.
    Shades,
    /// ASCII, for output that is not a terminal.
    Letters,
}

impl Style {
    /// Returns the style for standard output.
    pub fn of_output() -> Self {
        if std::io::stdout().is_terminal() { Self::Shades } else { Self::Letters }
    }

    /// Returns the marks from all free to none free, and the mark of the balloon.
    const fn marks(self) -> ([char; 5], char) {
        match self {
            Self::Shades => (['·', '░', '▒', '▓', '█'], 'o'),
            Self::Letters => (['.', '-', '+', '*', '#'], 'o'),
        }
    }
}

/// Draws the map with its legend.
pub fn draw(map: &CoarseMap, style: Style) -> String {
    let (marks, balloon) = style.marks();
    let cell_bytes = map.cell_pages.saturating_mul(BALLOON_PAGE_BYTES);
    let mut text = format!(
        "\n  a character is {}: {} free, {}{}{} partly, {} in use, {balloon} balloon\n",
        Size(cell_bytes),
        marks[0],
        marks[1],
        marks[2],
        marks[3],
        marks[4]
    );
    for region in &map.regions {
        let cells = region.free_pages.iter().zip(&region.balloon_pages).enumerate();
        let marks: Vec<char> = cells
            .map(|(cell, (free, balloon))| {
                mark(style, pages_of(region, map.cell_pages, cell), *free, *balloon)
            })
            .collect();
        for (line, marks) in marks.chunks(LINE_CELLS).enumerate() {
            let cells = (line * LINE_CELLS) as u64;
            let page = region.first_page.saturating_add(cells.saturating_mul(map.cell_pages));
            let address = page.saturating_mul(BALLOON_PAGE_BYTES);
            let marks: String = marks.iter().collect();
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {address:>#12x} {marks}");
        }
    }
    text
}

/// Returns the pages in a cell: the last one of a region may have fewer.
fn pages_of(region: &CoarseRegion, cell_pages: u64, cell: usize) -> u64 {
    let before = (cell as u64).saturating_mul(cell_pages);
    region.pages.saturating_sub(before).min(cell_pages)
}

fn mark(style: Style, pages: u64, free: u64, balloon: u64) -> char {
    let (marks, balloon_mark) = style.marks();
    if balloon.saturating_mul(2) > pages {
        return balloon_mark;
    }
    // Pages not in the balloon are free or in use.
    let own = pages.saturating_sub(balloon).max(1);
    let used = own.saturating_sub(free);
    let steps = marks.len() as u64 - 1;
    let step = match used {
        0 => 0,
        used if used >= own => steps,
        // The extreme marks are only for cells that are entirely free or entirely in use.
        used => used.saturating_mul(steps).div_ceil(own).clamp(1, steps - 1),
    };
    marks[usize::try_from(step).unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uniform_cells_get_the_extreme_marks() {
        let letters = |free, balloon| mark(Style::Letters, 8, free, balloon);
        let marks: String = (0..=8).rev().map(|free| letters(free, 0)).collect();
        assert_eq!(marks, ".--++***#");
        assert_eq!([letters(0, 5), letters(0, 4), letters(4, 4)], ['o', '#', '.']);
    }

    #[test]
    fn lines_begin_with_their_address() {
        let map = CoarseMap {
            cell_pages: 256,
            regions: vec![CoarseRegion {
                first_page: 0x100,
                pages: 64 * 256 + 1,
                free_pages: [vec![256; 64], vec![1]].concat(),
                balloon_pages: vec![0; 65],
            }],
        };
        let text = draw(&map, Style::Letters);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "  a character is 1 MiB: . free, -+* partly, # in use, o balloon");
        assert_eq!(lines[2], format!("      0x100000 {}", ".".repeat(64)));
        assert_eq!(lines[3], "     0x4100000 .");
    }
}
