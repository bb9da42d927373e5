package api

import (
	"bytes"
	_ "embed"
)

//go:embed openapi.json
var openAPI []byte

// OpenAPI returns the OpenAPI 3.1 document of the sockets, as GET /openapi.json serves it.
func OpenAPI() []byte { return bytes.Clone(openAPI) }
