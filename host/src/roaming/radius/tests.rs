//! Round trips, golden bytes, truncation at every octet, and hostile input.

use proptest::prelude::*;

use super::*;

const SECRET: &[u8] = b"kage-secret";

fn report() -> Accounting {
    Accounting {
        user_name: Some("alice".into()),
        chargeable_user_identity: Some(vec![0, 1, 255]),
        class: Some(b"staff".to_vec()),
        calling_station_id: Some("02-6B-61-67-65-D1".into()),
        called_station_id: Some("02-6B-61-67-65-A1:kage".into()),
        nas_identifier: Some("ap-1".into()),
        nas_ipv6_address: Some("fd00::7".parse().unwrap()),
        nas_ip_address: Some("10.0.0.7".parse().unwrap()),
        session_id: Some("0000002A".into()),
        multi_session_id: Some("d1-ap-1-7".into()),
        event_timestamp: Some(1_700_000_000),
        delay_seconds: Some(0),
        session_seconds: Some(60),
        input_octets: Some(7),
        output_octets: Some((3 << 32) | 5),
        framed_ipv6_address: Some("fd4b:6167:65ff::1".parse().unwrap()),
        framed_ip_address: Some("10.78.0.1".parse().unwrap()),
        ..Accounting::new(Status::Start)
    }
}

#[test]
fn a_report_survives_the_wire() {
    let bytes = report().encode(9, SECRET).unwrap();
    let packet = Packet::parse(&bytes).unwrap();
    assert!(packet.is_request_of(SECRET));
    assert_eq!((packet.code(), packet.identifier()), (ACCOUNTING_REQUEST, 9));
    assert_eq!(Accounting::from_packet(&packet).unwrap(), report());
}

#[test]
fn the_bytes_are_those_of_the_rfc() {
    let minimal = Accounting { user_name: Some("bob".into()), ..Accounting::new(Status::Stop) };
    let bytes = minimal.encode(1, b"s").unwrap();
    assert_eq!(bytes[..4], [4, 1, 0, 31]);
    assert_eq!(bytes[20..], [40, 6, 0, 0, 0, 2, 1, 5, b'b', b'o', b'b']);
    // `printf '\4\1\0\37' + 16 zeros + attributes + 's' | md5sum`
    let mut input = vec![4, 1, 0, 31];
    input.extend([0; 16]);
    input.extend(&bytes[20..]);
    input.push(b's');
    assert_eq!(bytes[4..20], Md5::digest(&input)[..]);
}

#[test]
fn counters_are_64_bits_in_two_attributes() {
    let octets = |attributes: &[u8]| {
        let mut bytes = header(ACCOUNTING_REQUEST, 1);
        bytes.extend([40, 6, 0, 0, 0, 3]);
        bytes.extend(attributes);
        sign(&mut bytes, &[0; 16], SECRET);
        Accounting::from_packet(&Packet::parse(&bytes).unwrap()).unwrap().octets()
    };
    assert_eq!(octets(&[]), None);
    assert_eq!(octets(&[42, 6, 0, 0, 1, 0]), Some(256));
    assert_eq!(octets(&[42, 6, 0, 0, 1, 0, 52, 6, 0, 0, 0, 2, 43, 6, 0, 0, 0, 1]), Some((2 << 32) + 257));
    let most = [42, 43, 52, 53].map(|kind| [kind, 6, 255, 255, 255, 255]).concat();
    assert_eq!(octets(&most), Some(u64::MAX));
}

#[test]
fn another_secret_or_a_changed_octet_is_noticed() {
    let bytes = report().encode(9, SECRET).unwrap();
    assert!(!Packet::parse(&bytes).unwrap().is_request_of(b"other"));
    for octet in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[octet] ^= 1;
        if let Ok(packet) = Packet::parse(&changed) {
            assert!(!packet.is_request_of(SECRET), "octet {octet}");
        }
    }
}

#[test]
fn a_response_belongs_to_its_request_alone() {
    let mut bytes = report().encode(9, SECRET).unwrap();
    bytes.extend([attribute::PROXY_STATE, 5, 1, 2, 3]);
    sign(&mut bytes, &[0; 16], SECRET);
    let request = Packet::parse(&bytes).unwrap();
    let answer = request.response(SECRET);
    let answer = Packet::parse(&answer).unwrap();
    assert!(answer.answers(&request, SECRET));
    assert_eq!(answer.attribute(attribute::PROXY_STATE), Some(&[1, 2, 3][..]));
    assert!(!answer.answers(&request, b"other"));
    let later = report().encode(10, SECRET).unwrap();
    assert!(!answer.answers(&Packet::parse(&later).unwrap(), SECRET));
}

#[test]
fn a_packet_cut_anywhere_is_refused() {
    let bytes = report().encode(9, SECRET).unwrap();
    for length in 0..bytes.len() {
        assert!(matches!(Packet::parse(&bytes[..length]), Err(RadiusError::Truncated { .. })), "{length}");
    }
    let mut padded = bytes.clone();
    padded.extend([0; 7]);
    assert!(Packet::parse(&padded).unwrap().is_request_of(SECRET));
}

#[test]
fn lengths_that_lie_are_refused() {
    let with = |length: u16, attributes: &[u8]| {
        let mut bytes = vec![4, 1, (length >> 8) as u8, length as u8];
        bytes.extend([0; 16]);
        bytes.extend(attributes);
        bytes.resize(bytes.len().max(usize::from(length)), 0);
        bytes
    };
    assert_eq!(Packet::parse(&with(19, &[])).unwrap_err(), RadiusError::Length(19));
    assert_eq!(Packet::parse(&with(4097, &[])).unwrap_err(), RadiusError::Length(4097));
    for attributes in [&[1][..], &[1, 0], &[1, 1], &[1, 3], &[1, 2, 1, 9, 0]] {
        let bytes = with(20 + attributes.len() as u16, attributes);
        assert!(matches!(Packet::parse(&bytes), Err(RadiusError::AttributeLength { .. })), "{attributes:?}");
    }
}

#[test]
fn malformed_values_are_refused_by_name() {
    for (attributes, error) in [
        (&[1, 3, b'a'][..], RadiusError::NoStatus),
        (&[40, 5, 0, 0, 1], RadiusError::AttributeValue { kind: 40 }),
        (&[40, 6, 0, 0, 0, 1, 1, 3, 0xff], RadiusError::AttributeValue { kind: 1 }),
        (&[40, 6, 0, 0, 0, 1, 168, 3, 0xff], RadiusError::AttributeValue { kind: 168 }),
        (&[40, 6, 0, 0, 0, 1, 55, 3, 0xff], RadiusError::AttributeValue { kind: 55 }),
    ] {
        let mut bytes = header(ACCOUNTING_REQUEST, 1);
        bytes.extend(attributes);
        sign(&mut bytes, &[0; 16], SECRET);
        assert_eq!(Accounting::from_packet(&Packet::parse(&bytes).unwrap()), Err(error));
    }
    let answer = Packet::parse(&report().encode(1, SECRET).unwrap()).unwrap().response(SECRET);
    assert_eq!(Accounting::from_packet(&Packet::parse(&answer).unwrap()), Err(RadiusError::Code(5)));
}

#[test]
fn a_value_that_does_not_fit_is_refused() {
    let long = Accounting { user_name: Some("x".repeat(254)), ..report() };
    assert_eq!(long.encode(1, SECRET), Err(RadiusError::TooLong { kind: 1 }));
}

proptest! {
    #[test]
    fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Ok(packet) = Packet::parse(&bytes) {
            let _ = Accounting::from_packet(&packet);
            let _ = packet.response(SECRET);
        }
    }

    #[test]
    fn foreign_attributes_never_panic(attributes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let mut bytes = header(ACCOUNTING_REQUEST, 1);
        bytes.extend(attributes);
        sign(&mut bytes, &[0; 16], SECRET);
        if let Ok(packet) = Packet::parse(&bytes) {
            let _ = Accounting::from_packet(&packet);
        }
    }
}
