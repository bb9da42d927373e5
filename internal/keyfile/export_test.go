package keyfile

// Strength returns what keys are written with.
func Strength() (pem, jwk int, raw Cost) { return strength.pem, strength.jwk, strength.raw }

// SetStrength changes it, so that tests do not spend their time in key derivation.
func SetStrength(pem, jwk int, raw Cost) { strength.pem, strength.jwk, strength.raw = pem, jwk, raw }
