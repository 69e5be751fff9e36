//! Numbers of one sign bit, four bits of exponent and three of mantissa (e4m3, without infinity).

/// The largest number.
pub(crate) const LARGEST: f32 = 448.0;

/// The number of this code; NaN for 127 and 255.
pub(crate) fn to_f32(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = match (exponent, code & 127) {
        (_, 127) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (8.0 + mantissa) * 2.0_f32.powi(exponent - 10),
    };
    if code < 128 { magnitude } else { -magnitude }
}

/// The nearest code, ties to even; too large numbers become the largest. `x` is not NaN.
pub(crate) fn from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 128 } else { 0 };
    let x = x.abs().min(LARGEST);
    // Steps of the number's own binade, not below the smallest normal one's.
    let exponent = ((x.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (x * 2.0_f32.powi(3 - exponent)).round_ties_even() as i32;
    // One more than the mantissa holds carries into the exponent, as it should.
    sign | ((exponent + 6) * 8 + steps) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for code in (0..=255).filter(|code| code & 127 != 127) {
            assert_eq!(from_f32(to_f32(code)), code);
        }
        assert_eq!((to_f32(0x7e), to_f32(0x01), to_f32(0x38)), (448.0, 1.0 / 512.0, 1.0));
        assert!(to_f32(0x7f).is_nan());
    }

    #[test]
    fn between_two_codes_the_nearer_wins_and_ties_are_even() {
        for code in 0..0x7e_u8 {
            let (low, high) = (to_f32(code), to_f32(code + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(from_f32(middle), if code % 2 == 0 { code } else { code + 1 }, "{middle}");
            assert_eq!(from_f32(low * 0.6 + high * 0.4), code);
            assert_eq!(from_f32(-(low * 0.4 + high * 0.6)), 0x80 | (code + 1));
        }
        assert_eq!(from_f32(1e9), 0x7e);
    }
}
