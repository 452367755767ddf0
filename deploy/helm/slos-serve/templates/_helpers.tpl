{{- define "slos-serve.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- define "slos-serve.selector" -}}
app.kubernetes.io/name: slos-serve
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
{{- define "slos-serve.labels" -}}
{{ include "slos-serve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}
