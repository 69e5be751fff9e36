//! `--embedding-dimensions`: to how many numbers embeddings may be cut.

use std::str::FromStr;

/// A width that embeddings may be cut to; see [`widths`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dimensions {
    /// Every one.
    Any,
    /// This one.
    To(usize),
}

impl FromStr for Dimensions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text.trim(), text.trim().parse::<usize>()) {
            ("any", _) => Ok(Self::Any),
            (_, Ok(width @ 1..)) => Ok(Self::To(width)),
            _ => Err("`any` or whole numbers above 0 are wanted, such as 256,512".to_owned()),
        }
    }
}

/// The widths below `own`, ascending, that a model's embeddings may be cut to: those its folder says it was `trained`
/// for and those that were `given`.
///
/// # Errors
/// If a given width is above `own`.
pub fn widths(given: &[Dimensions], trained: Option<&[usize]>, own: usize) -> Result<Vec<usize>, String> {
    let mut widths = trained.unwrap_or_default().to_vec();
    for dimensions in given {
        match *dimensions {
            Dimensions::Any => widths.extend(1..own),
            Dimensions::To(width) if width <= own => widths.push(width),
            Dimensions::To(width) => {
                return Err(format!("--embedding-dimensions {width}: the model has {own} dimensions"));
            }
        }
    }
    widths.retain(|width| *width < own);
    widths.sort_unstable();
    widths.dedup();
    Ok(widths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_widths_join_those_of_the_model() {
        let parsed = |text: &str| text.split(',').map(str::parse).collect::<Result<Vec<Dimensions>, _>>();
        let given = parsed("4,2,8").expect("numbers");
        assert_eq!(widths(&given, Some(&[6, 4]), 8), Ok(vec![2, 4, 6]));
        assert_eq!(widths(&parsed("any").expect("a word"), None, 4), Ok(vec![1, 2, 3]));
        assert_eq!(widths(&[], None, 4), Ok(vec![]));
        assert!(widths(&given, None, 7).is_err_and(|error| error.contains('8')));
        for bad in ["0", "-1", "some", "", "4,,2"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }
}
