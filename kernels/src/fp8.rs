//! Floats of 8 bits: sign, 4 bits of exponent, 3 of mantissa; no infinities, NaN has all bits but the sign set (e4m3).

/// The largest number.
pub(crate) const MAX: f32 = 448.0;

/// The nearest number, ties to the even one; beyond the largest, the largest. Bit for bit as GPUs convert.
pub(crate) fn from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return 0x7f;
    }
    let magnitude = x.abs().min(MAX);
    // The unit of the last place: an eighth of the power of two below, at least that of the smallest normal number.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let units = magnitude * 2.0_f32.powi(3 - exponent);
    // Exact: at most 16 units, and powers of two only scale.
    let count = units.round_ties_even() as u8;
    // 8 units are the next exponent's first number, so rounding up may carry.
    sign | (count + (((exponent + 6) as u8) << 3))
}

/// Exact.
pub(crate) fn to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 0x7f) {
        (_, 0x7f) => f32::NAN,
        (0, _) => mantissa * 2.0_f32.powi(-9),
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::{from_f32, to_f32};

    #[test]
    fn every_number_is_itself_and_middles_go_to_the_even_neighbour() {
        for bits in 0..=255_u8 {
            let x = to_f32(bits);
            assert!(x.is_nan() || from_f32(x) == bits, "{bits:#x} is {x}");
        }
        assert_eq!((to_f32(0x7e), to_f32(1), to_f32(0x38)), (448.0, 2.0_f32.powi(-9), 1.0));
        for bits in 0..0x7e_u8 {
            let (low, high) = (to_f32(bits), to_f32(bits + 1));
            let middle = (low + high) / 2.0;
            let even = if bits % 2 == 0 { bits } else { bits + 1 };
            assert_eq!(from_f32(middle), even, "between {low} and {high}");
            assert_eq!(from_f32(f32::from_bits(middle.to_bits() - 1)), bits);
            assert_eq!(from_f32(-f32::from_bits(middle.to_bits() + 1)), 0x80 | (bits + 1));
        }
        assert_eq!((from_f32(1e9), from_f32(f32::NEG_INFINITY), from_f32(f32::NAN)), (0x7e, 0xfe, 0x7f));
    }
}
